"""Distilling drafts from the target: prompts, responses, recipes."""
