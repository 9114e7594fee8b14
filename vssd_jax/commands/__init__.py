"""The commands: flags, one call into the library, one line for a user's error."""
