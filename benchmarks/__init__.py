"""Side-by-side measurements that print ratios; see README.md. Not tests, and not part of the package."""
