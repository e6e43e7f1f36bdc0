"""From a meta-file to rows of tensors: records, scripts, a plan, rows. No torch but in rows.py."""
