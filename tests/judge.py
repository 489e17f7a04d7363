#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Test how scripts/test judges the output of a virtual machine, without running one.

The tests of the harness in tests/list show that a machine reports errors.  These tests
show that no wrong or missing report is accepted as a pass.
"""
import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
import types
import unittest
from unittest import mock

TOP = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("judge", os.path.join(TOP, "scripts", "test"))
test = importlib.util.module_from_spec(importlib.util.spec_from_loader("judge", loader))
loader.exec_module(test)

VERDICT = ["begin 7.3.4 #1", "exit 0", "end"]
CONSOLE = ["reboot: Power down"]
TAP = ["TAP version 13", "1..2", "ok 1 one", "ok 2 two"]

# A matching line for each pattern of tests/splats, in the same order.
SPLATS = [
    "BUG: unable to handle page fault for address: ffff888000000000",
    "kernel: BUG at mm/hugetlb.c:1!",
    "WARNING: CPU: 0 PID: 1 at mm/hugetlb.c:1",
    "kernel BUG at mm/hugetlb.c:1!",
    "Oops: Oops: 0000 [#1] SMP",
    "Kernel panic - not syncing: hung_task: blocked tasks",
    "BUG: KASAN: slab-use-after-free in kvm_gmem_release",
    "UBSAN: array-index-out-of-bounds in mm/hugetlb.c:1:2",
    "BUG: KCSAN: data-race in a / kvm_gmem_b",
    "BUG: KFENCE: out-of-bounds read in a",
    "BUG: Bad page state in process init  pfn:12345",
    "page dumped because: VM_BUG_ON_FOLIO(folio_test_locked(folio))",
    "BUG: Bad rss-counter state mm:0 type:MM_FILEPAGES val:1",
    "WARNING: possible circular locking dependency detected",
    "WARNING: held lock freed!",
    "INFO: lockdep is turned off.",
    "BUG: sleeping function called from invalid context at mm/a.c:1",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 23s!",
    "INFO: task init:1 blocked for more than 120 seconds.",
    "ODEBUG: free active (active state 0) object: 1 object type: work_struct",
    "list_del corruption. prev->next should be 1, but was 2",
    "refcount_t: underflow; use-after-free.",
    "percpu ref (a) <= 0 (-1) after switching to atomic",
    "page_counter underflow: -512 nr_pages=512",
    "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    "INFO: trying to register non-static key.",
    "page: refcount:0 mapcount:0 mapping:0 index:0x0 pfn:0x1",
    "Out of memory: Killed process 12 (test) total-vm:1kB",
    "[Redzone overwritten] 0x1-0x2 @offset=1",
    "VFS: Busy inodes after unmount of guest_memfd",
    "unreferenced object 0xffff888000000000 (size 64):",
]


class Judge(unittest.TestCase):
    def judge(self, kind="tap", verdict=VERDICT, console=CONSOLE, output=TAP, debug=False, own=0,
              nonce="n"):
        outcome = test.Outcome()
        with tempfile.TemporaryDirectory() as logs:
            for name, lines in (("nonce", [nonce]), ("console", console), ("output", output),
                                ("verdict", ["n " + line for line in verdict])):
                with open(os.path.join(logs, name), "w") as f:
                    f.write("".join(line + "\n" for line in lines))
            status = test.judge_verdict(outcome, logs, debug)
            test.judge_own_status(outcome, own, status)
            test.judge_console(outcome, logs)
        (test.judge_tap if kind == "tap" else test.judge_exit)(outcome, output, status)
        return outcome

    def objects(self, text, **kwargs):
        objections = self.judge(**kwargs).objections
        self.assertTrue(any(text in o for o in objections), objections)

    def test_passes(self):
        self.assertEqual(self.judge().objections, [])
        self.assertEqual(self.judge(kind="exit", output=["done"]).results, {"-": "ok"})
        self.assertEqual(self.judge(debug=True, verdict=VERDICT[:2] + ["scanned", "end"]).objections,
                         [])

    def test_verdict(self):
        self.objects("did not start", verdict=[])
        self.objects("did not start", nonce="of another boot")
        self.objects("ended early", verdict=VERDICT[:2])
        self.objects("not scanned", debug=True)
        self.objects("did not power off", console=[])
        self.objects("exit status 1", verdict=[VERDICT[0], "exit 1", "end"], own=1)
        self.objects("signal 9", verdict=[VERDICT[0], "signal 9", "end"], own=137)
        self.objects("timeout", verdict=[VERDICT[0], "timeout 3"], own=124)
        for line in ("counter /proc/meminfo:HugePages_Free: 4 -> 3", "left behind: process 7 (a)",
                     "kmemleak unreferenced object", "init: /job: broken", "exec: a: not there",
                     "counter /sys/fs/cgroup/test/hugetlb.2MB.current 0 -> 2097152"):
            self.objects(line, verdict=VERDICT[:2] + [line, "end"])

    def test_own_status(self):
        self.objects("has ended with 0, and not with 7", verdict=[VERDICT[0], "exit 7", "end"])
        self.objects("has ended with 1, and not with 0", own=1)
        self.objects("has ended with 0, and not with 124", verdict=[VERDICT[0], "timeout 3"])
        self.objects("has ended with 0, and not with 125", verdict=VERDICT[:1])
        self.objects("has ended with 0, and not with 139", verdict=[VERDICT[0], "signal 11", "end"])

    def test_console(self):
        patterns = list(test.fields("splats"))
        self.assertEqual(len(patterns), len(SPLATS))
        for pattern, line in zip(patterns, SPLATS):
            self.assertRegex(line, pattern)
            self.objects("splat: " + line, console=[line] + CONSOLE)

    def test_data_race(self):
        race = ["BUG: KCSAN: data-race in mas_store / mas_walk", "",
                "write to 0xffff888007d3a010 of 8 bytes by task 43 on cpu 0:",
                " mas_store+0x10/0x90", " tick_sched_do_timer+0x10/0x90", "",
                "read to 0xffff888007d3a010 of 8 bytes by task 47 on cpu 1:",
                " mas_walk+0x10/0x90", " mtree_load+0x4a/0xa0", "", "=" * 66, "kvm_gmem_b"]
        self.assertEqual(self.judge(console=race + CONSOLE).objections, [])
        race[8] = " kvm_gmem_attributes_get+0x4a/0xa0"
        self.objects("splat: " + race[0], console=race + CONSOLE)

    def test_tap(self):
        self.objects("no plan", output=TAP[2:])
        self.objects("no test ran", output=["1..0"])
        self.objects("1 of 2", output=TAP[:3])
        self.objects("3 of 2", output=TAP + ["ok 3 three"])
        self.objects("more than one plan", output=TAP + ["1..2"])
        self.objects("result 2 where 1 was due", output=["1..1", "ok 2 two"])
        self.objects("Bail out!", output=TAP + ["Bail out! no more"])
        self.objects("not ok: two", output=TAP[:3] + ["not ok 2 two"])
        self.objects("exit status 4", output=TAP, verdict=[VERDICT[0], "exit 4", "end"], own=4)

    def test_exit(self):
        outcome = self.judge(kind="exit", output=["x"], verdict=[VERDICT[0], "exit 2", "end"], own=2)
        self.assertEqual(outcome.results, {"-": "fail"})
        self.assertIn("exit status 2", outcome.objections)
        outcome = self.judge(kind="exit", output=["skipping, no KVM"],
                             verdict=[VERDICT[0], "exit 4", "end"], own=4)
        self.assertEqual(outcome.results, {"-": "skip"})
        outcome = self.judge(kind="exit", output=["a part is skipped"])
        self.assertEqual(outcome.results, {"-": "ok", "a part is skipped": "skip"})

    def with_table(self, name, lines):
        real = test.fields
        self.addCleanup(setattr, test, "fields", real)
        test.fields = lambda n: lines if n == name else real(n)

    def test_skips(self):
        subject = test.Test("name tap series release 10 -- tests/x")

        def objections(results):
            outcome = test.Outcome()
            outcome.results = dict(results)
            outcome.reasons = {p: "why" for p in results}
            test.judge_skips(subject, outcome, "release")
            return outcome.objections

        self.with_table("skips", ["any name a* -- reason", "debug name b -- reason"])
        self.assertEqual(objections({"a1": "skip", "b": "ok"}), [])
        self.assertIn("unexpected skip: b (why)", objections({"a1": "skip", "b": "skip"}))
        self.assertIn("expected to be skipped, but ran: a1", objections({"a1": "ok"}))
        self.assertIn("expected to be skipped, but is not there: a*", objections({"b": "ok"}))

    def test_left_out(self):
        def objections(line, kernel):
            outcome = test.Outcome()
            test.judge_left_out(outcome, ["ok 1 a", line], kernel)
            return outcome.objections

        line = "# left out: a check, needs CONFIG_KVM_GMEM_TEST and debugfs"
        self.assertEqual(objections(line, "release"), [line[2:]])
        self.assertEqual(objections(line, "plain"), [])
        self.assertEqual(len(objections("# left out: a pin, needs CONFIG_GUP_TEST", "plain")), 1)

    def test_kept(self):
        subject = test.Test("name tap series release 10 -- tests/x")
        self.with_table("kept", ["name counter */free_hugepages * -- reason"])
        outcome = test.Outcome()
        outcome.objections = ["counter /sys/a/free_hugepages 4 -> 3", "counter b 1 -> 2"]
        test.judge_kept(subject, outcome)
        self.assertEqual(outcome.objections, ["counter b 1 -> 2"])
        outcome.objections = []
        test.judge_kept(subject, outcome)
        self.assertTrue(outcome.objections[0].startswith("expected to be left changed, but is not"))

    def test_baseline(self):
        subject = test.Test("name tap base release 10 -- mm/x")
        outcome = test.Outcome()
        outcome.results = {"a": "ok", "b": "skip", "d": "ok"}
        test.judge_baseline(subject, outcome, {"a": "ok", "b": "ok", "c": "ok"})
        self.assertEqual(outcome.objections, ["on the unpatched kernel ok, here skip: b",
                                              "on the unpatched kernel ok, here nothing: c",
                                              "on the unpatched kernel nothing, here ok: d"])
        outcome = test.Outcome()
        test.judge_baseline(subject, outcome, None)
        self.assertTrue(re.match("not in tests/baseline", outcome.objections[0]))

    def test_list(self):
        lines = ["$small = --mem 1G --cpus 1", "", "# a comment",
                 "a tap series release,debug:slow 10 $small -- kvm/a",
                 "b exit base release:slow 20 -- mm/b"]
        with mock.patch("builtins.open", mock.mock_open(read_data="\n".join(lines))):
            first, second = test.tests_in_list()
        self.assertEqual(first.options, ["--mem", "1G", "--cpus", "1"])
        self.assertEqual(first.runs, {"release": False, "debug": True, "plain": False,
                                      "kcsan": False})
        self.assertEqual(second.runs, {"release": True, "unpatched": False})
        args = types.SimpleNamespace(flavour="debug", pace=1.5)
        self.assertEqual(test.allowed_seconds(first, args), 60)

    def test_memory(self):
        line = "name tap series release 10 --file kvm/helper=/bin/x -- kvm/x -n 1"
        args = types.SimpleNamespace(base=False, flavour="release")
        read = []

        def name(changed=None, line=line, args=args):
            with mock.patch.object(test, "digest", lambda path: (
                    read.append(path), "new" if path == changed else "old")[1]):
                return test.memory(test.Test(line), args)

        before = name()
        self.assertEqual(before, name())
        files = set(read)
        for part in ("kernel/arch/x86/boot/bzImage", "kvm/x", "kvm/helper", "tests/skips",
                     "tests/init.c", "scripts/run"):
            self.assertTrue(any(path.endswith(part) for path in files), part)
        for path in files:
            self.assertNotEqual(before, name(path), path)
        self.assertNotEqual(before, name(line=line.replace("-n 1", "-n 2")))
        self.assertNotEqual(before, name(
            args=types.SimpleNamespace(base=False, flavour="debug")))
        self.assertIsNone(name(line=line.replace("name", "some_race_test")))

    def test_memory_of_nested(self):
        args = types.SimpleNamespace(base=False, flavour="release")
        read = []

        def name(changed=None):
            with mock.patch.object(test, "digest", lambda path: (
                    read.append(path), "new" if path == changed else "old")[1]), \
                 mock.patch.object(os, "listdir", lambda path: ["bios"]):
                return test.memory(test.Test("name tap series release 10 --qemu -- tests/x"), args)

        before = name()
        files = set(read)
        for part in ("qemu-run/qemu-system-x86_64", "qemu-run/fw/bios", "guest/bzImage",
                     "guest/initrd", "tests/qemu/lib"):
            self.assertTrue(any(path.endswith(part) for path in files), part)
        for path in files:
            self.assertNotEqual(before, name(path), path)

    def test_what_has_failed_is_not_remembered(self):
        outcome = test.Outcome()
        outcome.memory = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), "a", "b")
        outcome.results = {"a": "ok"}
        self.assertFalse(test.recall(outcome))
        test.keep(outcome)
        self.assertTrue(test.recall(outcome))
        outcome.objections = ["not ok: a"]
        test.keep(outcome)
        outcome.objections = []
        test.keep(outcome)
        self.assertFalse(test.recall(outcome))


if __name__ == "__main__":
    unittest.main()
