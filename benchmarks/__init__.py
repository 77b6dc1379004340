"""What the pages of docs/ say was measured, a script each; ``python -m benchmarks``: time and memory beside peers."""
