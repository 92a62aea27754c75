"""compressm in other people's training loops and models. Each module needs the package that it is named after."""
