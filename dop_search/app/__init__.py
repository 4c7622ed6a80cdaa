"""Everything of Hydra, pydantic and MLflow: commands, configuration, records, reports, tracking, studies."""
