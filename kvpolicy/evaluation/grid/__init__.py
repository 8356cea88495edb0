"""Tasks x compositions x sizes: measured cells, their files, tables, claims and plots."""
