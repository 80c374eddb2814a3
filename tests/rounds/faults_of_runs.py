"""Faults 1 to 18 of the reliability plan: of processes, disks, lines and what comes over them."""

Fault = tuple[str, list[str]]
"""A fault in a few words, and the tests that cover it."""

SIM = "tests/rounds/test_simworld.py::"
WIRE = "tests/core/test_wire_hostile.py::"
DESK = "tests/client/test_desk.py::"

FAULTS: dict[int, Fault] = {
    1: (
        "coordinator killed at each point of a round",
        [
            SIM + "test_a_coordinator_that_dies_at_any_point_of_its_work_ends_at_the_same_bits",
            "tests/server/test_machine.py::"
            "test_a_crash_at_every_event_costs_no_committed_round_and_repeats_none",
            "tests/rounds/test_crash.py::"
            "test_a_run_killed_and_then_stopped_ends_where_an_undisturbed_one_does",
            "tests/rounds/test_deployed.py::"
            "test_what_is_killed_in_a_round_is_started_again_and_changes_no_bit",
        ],
    ),
    2: (
        "killed or unplugged while a checkpoint is written",
        [
            SIM + "test_a_coordinator_that_dies_at_any_point_of_its_work_ends_at_the_same_bits",
            "tests/server/test_checkpoint.py::"
            "test_a_crash_between_arrays_and_facts_leaves_the_generation_before",
            "tests/server/test_checkpoint.py::"
            "test_a_crash_that_leaves_new_arrays_under_old_facts_falls_back",
        ],
    ),
    3: (
        "no space for checkpoint, ledger, journal",
        [
            SIM + "test_a_bad_disk_stops_a_run_and_a_good_one_takes_it_up",
            "tests/server/test_checkpoint.py::test_a_full_disk_leaves_the_generation_before",
            "tests/server/test_coordinator.py::"
            "test_a_full_disk_stops_the_run_and_the_round_is_not_committed",
            "tests/core/test_journal.py::test_a_full_disk_leaves_the_journal_as_it_was_and_usable",
            "tests/privacy/test_ledger_faults.py::"
            "test_a_full_disk_charges_nothing_and_the_ledger_goes_on_once_there_is_space",
            DESK + "test_a_reply_that_cannot_be_stored_is_not_sent",
        ],
    ),
    4: (
        "fsync fails",
        [
            SIM + "test_a_bad_disk_stops_a_run_and_a_good_one_takes_it_up",
            "tests/rounds/test_fault_list.py::"
            "test_a_disk_that_neither_syncs_nor_takes_back_spoils_no_journal",
            "tests/client/test_private_faults.py::test_on_a_full_disk_no_record_is_read_"
            "and_with_space_again_the_site_goes_on",
        ],
    ),
    5: (
        "site killed while it trains",
        [
            SIM + "test_a_site_that_dies_at_any_point_of_its_work_is_counted_once",
            "tests/client/test_worker.py::"
            "test_a_worker_killed_over_a_letter_answers_it_when_it_is_back",
            DESK + "test_answers_that_cost_privacy_are_charged_once",
            "tests/server/test_lost.py::"
            "test_a_site_that_died_is_asked_again_and_the_result_is_the_same",
        ],
    ),
    6: (
        "site killed after it sent, before it knows",
        [
            SIM + "test_a_site_that_dies_at_any_point_of_its_work_is_counted_once",
            DESK + "test_the_same_letter_gets_the_same_bytes_and_no_second_training",
        ],
    ),
    7: (
        "site killed between charge and training",
        [
            SIM + "test_a_site_that_dies_at_any_point_of_its_work_is_counted_once",
            "tests/privacy/test_ledger_crash.py::"
            "test_epsilon_is_at_least_the_truth_wherever_a_site_is_killed",
            "tests/client/test_worker.py::"
            "test_a_worker_killed_over_a_letter_answers_it_when_it_is_back",
        ],
    ),
    8: (
        "a straggler past the deadline",
        [
            SIM + "test_a_deadline_goes_by_no_calendar",
            SIM + "test_no_seed_breaks_a_promise",
            "tests/server/test_coordinator.py::"
            "test_a_slow_site_is_left_behind_and_its_late_update_is_stale",
            "tests/rounds/test_faults.py::"
            "test_a_slow_site_misses_rounds_and_its_late_updates_are_stale",
        ],
    ),
    9: (
        "sites cut off, and back",
        [
            SIM + "test_sites_that_are_cut_off_come_back_and_the_run_goes_on",
            SIM + "test_a_quorum_goes_on_without_sites_that_are_cut_off_and_they_rejoin",
        ],
    ),
    10: (
        "half-open lines and slow senders",
        [
            "tests/trust/test_proxy_limits.py::test_a_peer_that_stalls_is_cut",
            "tests/trust/test_proxy_limits.py::test_a_peer_that_takes_no_answer_is_cut",
            "tests/trust/test_proxy_limits.py::"
            "test_one_peers_requests_at_once_are_limited_and_anothers_are_not",
            "tests/trust/test_gate.py::test_a_connection_ends_at_a_certain_age",
            "tests/client/test_worker.py::"
            "test_a_sender_that_stops_in_the_middle_holds_nobody_up_for_long",
        ],
    ),
    11: (
        "every message doubled",
        [SIM + "test_lines_that_double_and_mix_change_no_bit"],
    ),
    12: (
        "last round's update again",
        [
            SIM + "test_a_hostile_site_is_refused_and_holds_nobody_up",
            "tests/server/test_seals.py::test_a_reply_that_is_not_this_sites_own_is_refused",
            "tests/server/test_machine.py::test_an_answer_to_the_attempt_before_is_stale",
            DESK + "test_a_round_that_was_passed_is_refused_unless_it_is_the_very_letter",
        ],
    ),
    13: (
        "captured headers with another body",
        [
            "tests/rounds/test_seal.py::"
            "test_what_was_altered_or_replayed_is_refused_and_journalled",
            "tests/trust/test_seal.py::test_one_bit_anywhere_is_noticed",
            "tests/trust/test_seal.py::test_a_seal_fits_nothing_else",
        ],
    ),
    14: (
        "delayed and out of order, ten thousand seeds",
        [
            SIM + "test_ten_thousand_seeds_break_no_promise",
            SIM + "test_no_seed_breaks_a_promise",
            SIM + "test_lines_that_double_and_mix_change_no_bit",
            "tests/server/test_machine.py::test_no_order_of_events_breaks_a_promise",
        ],
    ),
    15: (
        "NaN, infinities, 1e38, -0, denormals in an update",
        [
            SIM + "test_a_hostile_site_is_refused_and_holds_nobody_up",
            "tests/server/test_coordinator.py::"
            "test_a_bad_update_is_counted_by_reason_and_fails_nothing",
            "tests/rounds/test_fault_list.py::test_zeros_with_a_sign_and_denormals_are_numbers",
        ],
    ),
    16: (
        "another shape, dtype, name, order of bytes",
        [
            SIM + "test_a_hostile_site_is_refused_and_holds_nobody_up",
            WIRE + "test_a_vector_of_another_type_or_size_is_refused",
            WIRE + "test_a_vector_that_is_missing_doubled_renamed_or_unexpected_is_refused",
            WIRE + "test_another_layout_is_refused_with_what_to_compare",
        ],
    ),
    17: (
        "pickles, and headers that claim 2**40 elements",
        [
            WIRE + "test_a_claim_of_a_huge_array_allocates_nothing",
            WIRE + "test_a_vector_of_another_type_or_size_is_refused",
            WIRE + "test_any_array_gives_a_message_or_a_wire_error",
            SIM + "test_a_hostile_site_is_refused_and_holds_nobody_up",
        ],
    ),
    18: (
        "over the limit by a byte, or without end",
        [
            "tests/trust/test_proxy.py::test_a_body_is_cut_one_byte_after_its_limit",
            "tests/trust/test_proxy.py::test_an_answer_of_unknown_length_is_cut_at_the_limit",
            "tests/trust/test_proxy_limits.py::test_a_hundred_megabytes_pass_through_little_memory",
            "tests/client/test_worker.py::test_a_frame_over_four_mebibytes_does_not_pass",
            WIRE + "test_a_bad_header_is_refused",
        ],
    ),
}
"""By the plan's numbers."""

LACKS: dict[int, str] = {
    3: "a real file system of a megabyte is for `python -m tests.chaos`, where mounts are allowed",
    8: "no process is stopped with SIGSTOP for ten minutes: the simulator's hung site stands for "
    "it",
    10: "no sender of one byte a second: what stalls altogether is cut, and what trickles ends at "
    "the connection's greatest age",
    15: "-0 and denormals are not refused: they are numbers, and add up as such",
    17: "no archive is unpacked anywhere, so there is no zip to explode",
}
"""What the tests named do not show, or why there are none."""
