"""The claims of both papers, and what the records here say of each: docs/claims.md."""
