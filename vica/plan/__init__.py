"""What each layer does with each group of tokens, as data, and what that costs."""
