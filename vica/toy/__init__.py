"""A drawn world with exact answers: pictures, questions, and nine small benchmarks made of them."""
