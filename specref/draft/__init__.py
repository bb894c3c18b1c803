"""Drafters: everything that proposes."""
