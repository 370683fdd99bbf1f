"""What one gateway process keeps in memory."""
