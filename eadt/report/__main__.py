"""Print the JSON schema of ``report.json``: ``python -m eadt.report > docs/report.schema.json``."""

import json

from eadt.report import report_json_schema

print(json.dumps(report_json_schema(), indent=2))
