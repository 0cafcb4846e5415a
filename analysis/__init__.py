"""From result tables to figures, tables and reports; reads the store, never trains."""
