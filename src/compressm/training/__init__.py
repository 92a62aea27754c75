"""The Compressor: cuts a model while it trains, examines each cut, and undoes those that did harm."""
