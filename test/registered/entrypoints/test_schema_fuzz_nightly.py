"""20,000 requests made of the server's own document, valid and invalid."""

import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.schema_fuzz import SchemaFuzzTestCase

register_cpu_ci(est_time=1500, suite="nightly-cpu", nightly=True)


class TestSchemaFuzz(SchemaFuzzTestCase):
    def test_20000_cases(self):
        for seed in range(2, 22):
            self.check(1000, seed)


if __name__ == "__main__":
    unittest.main()
