"""The transforms that come with basis, one a file, registered as any other package would register its own."""
