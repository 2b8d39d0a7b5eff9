"""From rankings to tables: what evaluate, compare and the report share."""
