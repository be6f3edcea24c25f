"""500 requests made of the server's own document, valid and invalid."""

import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.schema_fuzz import SchemaFuzzTestCase

register_cpu_ci(est_time=45, suite="stage-b-test-cpu")


class TestSchemaFuzz(SchemaFuzzTestCase):
    def test_500_cases(self):
        self.check(500, seed=1)


if __name__ == "__main__":
    unittest.main()
