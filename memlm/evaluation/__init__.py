"""What experiments share: results, how they are run, written, compared and shown."""
