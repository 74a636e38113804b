"""From prompts to continuations: reading, generating, showing and saving."""
