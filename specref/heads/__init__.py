"""Draft heads: small modules that read the target's features."""
