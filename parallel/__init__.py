"""Who owns what, and how bytes move between ranks (arXiv 2507.07120, sections 2.1 and 2.2)."""
