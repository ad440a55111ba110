"""What reuse costs: quality of MAC against full attention on real models."""
