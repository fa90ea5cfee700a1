"""Feature ETL: raw rows -> parquet shards, schema and fitted transform."""
