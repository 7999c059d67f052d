"""Progressive module replacing, and what comes after it."""
