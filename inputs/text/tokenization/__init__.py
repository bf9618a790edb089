"""Vocabularies and word pieces: case, unknown characters, text to learn a vocabulary from."""
