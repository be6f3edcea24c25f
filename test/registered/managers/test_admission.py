"""The queue's bound: counts, refusals, and how long a client is told to wait."""

import unittest

from sglang.srt.managers.admission import Admission, Place
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_RETRY_AFTER_S
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class TestAdmission(CustomTestCase):
    def setUp(self):
        self.now = 1000.0
        self.admission = Admission(10, 100, clock=lambda: self.now)

    def status(self, *args):
        try:
            self.admission.check(*args)
        except RequestError as error:
            return error.status_code
        return None

    def test_bounds_of_requests_and_tokens(self):
        self.assertEqual([self.status(10, 100), self.status(11), self.status(0, 101)], [None, 400, 400])
        self.admission.add(8, 90)
        self.assertEqual([self.status(2), self.status(3), self.status(11)], [None, 503, 400])
        self.assertEqual([self.status(0, 10), self.status(0, 11)], [None, 503])
        self.admission.remove(8, 90)
        self.assertEqual(self.status(10, 100), None)
        self.assertEqual(self.admission.num_refused, 5)

    def test_room_for_any_request_and_places(self):
        for requests, tokens in ((10, 0), (0, 100)):
            self.assertIsNone(self.status_of_room())
            self.admission.add(requests, tokens)
            self.assertEqual(self.status_of_room(), 503)
            self.admission.remove(requests, tokens)
        places = [Place(self.admission) for _ in range(10)]
        self.assertEqual((self.status_of_room(), self.admission.num_refused), (503, 3))
        for _ in range(2):
            places[0].leave()
        self.assertEqual((self.status_of_room(), self.admission.num_requests), (None, 9))

    def status_of_room(self):
        try:
            self.admission.check_room()
        except RequestError as error:
            return error.status_code
        return None

    def test_no_bounds(self):
        self.admission = Admission(None, None)
        self.admission.add(10**6, 10**9)
        self.assertIsNone(self.status_of_room())
        self.assertIsNone(self.status(10**6, 10**9))

    def test_retry_after_is_the_time_in_which_the_queue_starts(self):
        self.assertEqual(self.admission.retry_after_s(), 5)  # nothing is known
        self.admission.add(10, 0)
        for _ in range(11):
            self.admission.started(2)
            self.now += 1
        self.assertEqual(self.admission.retry_after_s(), 5)  # 22 in 11 s: 2 per second, 10 wait
        self.admission.remove(10, 0)
        self.assertEqual(self.admission.retry_after_s(), 1)
        self.admission.add(10_000, 0)
        self.assertEqual(self.admission.retry_after_s(), MAX_RETRY_AFTER_S)
        self.now += 31
        self.assertEqual(self.admission.retry_after_s(), 5)
        with self.assertRaises(RequestError) as caught:
            self.admission.check()
        self.assertEqual(caught.exception.headers, {"Retry-After": "5"})


if __name__ == "__main__":
    unittest.main()
