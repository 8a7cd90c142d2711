"""The methods that come with basis, one per file, registered by entry points as any package's methods are."""
