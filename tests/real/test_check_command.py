# SPDX-License-Identifier: Apache-2.0
"""The check command itself: what a clean set-up says, exit statuses, and how it is written."""

from realparts.public import Public


def test_a_clean_setup(public: Public) -> None:
    report = public.check.run()
    assert report.bad == {}, report
    assert report.status == 0
