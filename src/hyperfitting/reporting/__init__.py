"""Reports of records: tables, figures, the page of an experiment, and the terminal's output."""
