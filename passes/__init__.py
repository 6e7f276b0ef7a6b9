"""The compiler's passes, one a file, each with its pre- and postcondition."""
