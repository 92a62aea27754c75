"""What a layer does with the data: its states, and what the loss thinks of them, at little cost."""
