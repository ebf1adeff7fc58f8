"""Pure policies, one a file: each looks at what was observed and answers one question."""
