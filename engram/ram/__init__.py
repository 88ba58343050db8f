"""The RAM tier: whole n-grams (bundles) cached in memory that many processes can read."""
