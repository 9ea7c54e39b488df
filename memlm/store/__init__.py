"""Memory as data: text is stored, asked for, edited, forgotten, saved and loaded."""
