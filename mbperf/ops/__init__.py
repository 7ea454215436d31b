"""The operators: public functions, their docstrings, and the shapes of what they return."""
