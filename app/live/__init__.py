"""Hold the state that one gateway process keeps in memory."""
