"""Prompts, images and training samples, from what a user gives to what the model takes."""
