"""What a user may ask: the declaration, its words, and errors about it. Imports no torch."""
