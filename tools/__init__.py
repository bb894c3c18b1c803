"""Scripts that build and check the book; nothing here is installed."""
