"""Faults 19 to 34, 41 and 42 of the reliability plan: of models, manifests, keys and records."""

from tests.rounds.faults_of_runs import DESK, SIM, WIRE, Fault

FAULTS: dict[int, Fault] = {
    19: (
        "another base model at a site",
        [
            "tests/models/test_base.py::test_a_base_of_another_digest_is_refused",
            "tests/client/test_agent.py::test_a_base_that_is_not_on_the_list_is_refused",
            "tests/server/test_coordinator.py::test_a_site_that_does_not_fit_takes_no_part",
        ],
    ),
    20: (
        "a model with another layer, or other frozen weights",
        [
            WIRE + "test_another_layout_is_refused_with_what_to_compare",
            "tests/models/test_exchange.py::"
            "test_an_adapter_carries_the_new_head_and_nothing_of_the_base",
            "tests/models/test_exchange.py::"
            "test_a_vector_of_another_size_is_refused_and_nothing_is_written",
            "tests/client/test_agent.py::test_an_update_of_another_layout_does_not_leave",
        ],
    ),
    21: ("other models to other sites, under secure aggregation", []),
    22: (
        "a manifest tampered with, of a stranger, or not approved",
        [
            "tests/trust/test_envelope.py::test_one_bit_anywhere_is_noticed",
            DESK + "test_a_manifest_that_its_coordinator_did_not_sign_is_refused",
            DESK + "test_an_unapproved_manifest_waits_for_the_sites_people",
            DESK + "test_a_letter_without_its_coordinators_seal_is_refused_before_anything",
            "tests/trust/test_roster.py::test_an_older_version_is_refused_by_who_saw_a_newer_one",
        ],
    ),
    23: (
        "less privacy than the site's policy",
        [
            "tests/client/test_policy.py::"
            "test_each_limit_lets_in_what_keeps_it_and_refuses_what_does_not",
            "tests/client/test_policy.py::"
            "test_a_stricter_policy_refuses_all_that_a_looser_one_does",
            "tests/client/test_guard.py::"
            "test_a_federation_that_hardly_hides_is_refused_whichever_request_comes_first",
        ],
    ),
    24: (
        "the budget runs out within a run",
        [
            "tests/client/test_guard.py::"
            "test_work_that_the_lifetime_budget_does_not_bear_never_begins",
            "tests/client/test_guard.py::"
            "test_a_site_whose_budget_is_spent_reads_samples_and_noises_nothing",
            "tests/rounds/test_private.py::"
            "test_runs_that_share_ledgers_add_up_until_the_lifetime_is_spent",
            "tests/privacy/test_ledger.py::test_the_budget_holds_with_the_real_accountant",
        ],
    ),
    25: (
        "clocks that are wrong, or jump",
        [
            SIM + "test_a_deadline_goes_by_no_calendar",
            SIM + "test_no_seed_breaks_a_promise",
            "tests/client/test_private_faults.py::test_by_a_clock_that_runs_back_no_record_is_read",
            "tests/privacy/test_ledger_faults.py::"
            "test_a_clock_set_back_far_charges_nothing_and_says_by_how_much",
            "tests/trust/test_certificates.py::test_check_times_names_what_to_do",
            "tests/client/test_preflight.py::test_a_clock_behind_the_ledger_fails",
        ],
    ),
    26: (
        "certificates and versions of TLS that are wrong",
        [
            "tests/trust/test_tls.py::test_a_client_certificate_that_is_wrong_is_refused",
            "tests/trust/test_tls.py::test_a_server_certificate_that_is_wrong_is_refused",
            "tests/trust/test_tls.py::test_a_client_without_certificate_is_refused",
            "tests/trust/test_tls.py::test_an_older_version_is_refused_by_both_ends",
            "tests/trust/test_certificates.py::test_other_implementations_refuse_before_and_after",
            "tests/rounds/test_seal.py::test_tls_13_alone_is_spoken",
        ],
    ),
    27: (
        "a revoked site's key",
        [
            "tests/server/test_seals.py::"
            "test_a_revoked_site_is_refused_at_once_and_an_older_roster_too",
            "tests/server/test_seals.py::test_a_revocation_during_a_run_counts",
            "tests/server/test_gate.py::test_strangers_and_the_revoked_are_refused_at_once",
            "tests/server/test_gate.py::test_a_roster_holds_from_the_moment_it_is_written",
            "tests/server/test_gate.py::"
            "test_a_certificate_that_ends_soon_is_told_of_when_it_is_used",
        ],
    ),
    28: (
        "two processes of one site",
        [
            "tests/client/test_worker.py::test_a_second_worker_of_a_site_is_refused",
            "tests/server/test_gate.py::test_a_second_node_of_a_site_waits_and_is_told_of",
            "tests/server/test_lost.py::test_of_two_nodes_of_one_site_the_newer_wins",
        ],
    ),
    29: (
        "a ledger's or journal's bytes flipped, lost, exchanged, cut",
        [
            "tests/core/test_journal.py::"
            "test_a_flipped_bit_anywhere_is_noticed_and_the_entry_named",
            "tests/core/test_journal.py::test_damage_is_noticed_and_the_first_bad_entry_named",
            "tests/core/test_journal.py::test_a_record_torn_at_any_byte_is_dropped_and_appended_to",
            "tests/privacy/test_ledger_faults.py::"
            "test_damage_names_the_first_bad_entry_and_charges_nothing",
            "tests/client/test_audit.py::test_a_broken_journal_is_not_opened",
        ],
    ),
    30: (
        "an older copy of a ledger put back",
        [
            "tests/privacy/test_ledger_faults.py::"
            "test_a_rollback_is_noticed_while_open_and_by_a_head_kept_elsewhere",
            "tests/privacy/test_ledger_faults.py::test_a_ledger_that_is_gone_is_not_begun_anew",
            "tests/server/test_private_coordinator.py::"
            "test_an_update_whose_ledger_does_not_grow_is_refused",
            "tests/client/test_ledger_cli.py::"
            "test_verify_ends_with_1_when_the_ledger_is_broken_or_rolled_back",
        ],
    ),
    31: (
        "a checkpoint's byte changed",
        [
            "tests/server/test_checkpoint.py::test_a_harmed_generation_is_passed_over_and_told",
            "tests/server/test_checkpoint.py::test_every_flipped_bit_of_the_facts_is_noticed",
            "tests/server/test_run.py::test_a_harmed_checkpoint_costs_its_round_and_is_told",
            "tests/rounds/test_fault_list.py::"
            "test_a_run_that_fell_back_to_the_generation_before_can_be_verified",
            "tests/server/test_commits.py::"
            "test_a_round_is_committed_twice_only_where_the_run_fell_back_between",
        ],
    ),
    32: (
        "records that are cut, wrong or endless",
        [
            "tests/data/test_jsonl.py::test_a_byte_order_mark_and_a_cut_last_line_are_survived",
            "tests/data/test_jsonl.py::test_any_bytes_give_records_or_a_data_error",
            "tests/data/test_readers.py::test_strict_names_place_column_reason_and_remedy",
            "tests/data/test_readers.py::test_every_format_skips_and_counts_bad_rows",
            "tests/data/test_csv.py::test_a_line_of_100_mb_is_passed_over_in_little_memory",
            "tests/rounds/test_faults.py::"
            "test_a_site_with_bad_records_refuses_with_the_line_and_not_the_record",
        ],
    ),
    33: (
        "anything at all to every reader",
        [
            WIRE + "test_any_header_gives_a_message_or_a_wire_error",
            WIRE + "test_any_array_gives_a_message_or_a_wire_error",
            WIRE + "test_nested_json_is_refused_at_any_depth",
            "tests/trust/test_envelope.py::test_only_a_typed_error_escapes",
            "tests/trust/test_kit.py::test_only_a_typed_error_escapes",
            "tests/trust/test_roster.py::test_only_a_typed_error_escapes",
            "tests/data/test_jsonl.py::test_any_bytes_give_records_or_a_data_error",
            "tests/rounds/test_fault_list.py::test_any_bytes_are_a_configuration_or_a_typed_error",
            "tests/rounds/test_fault_list.py::"
            "test_any_value_in_a_manifest_is_taken_or_a_typed_error",
            "tests/rounds/test_fault_list.py::test_any_bytes_are_a_journal_or_a_typed_error",
        ],
    ),
    34: (
        "canaries in the records",
        [
            "tests/rounds/test_leaks.py::test_no_canary_leaves_its_site",
            "tests/rounds/test_leaks.py::test_no_canary_leaves_its_site_whatever_goes_wrong",
            "tests/rounds/test_leaks.py::test_the_search_finds_a_canary_in_every_form",
            DESK + "test_no_record_s_text_is_told_whatever_breaks",
        ],
    ),
    41: (
        "two versions that meet",
        [
            WIRE + "test_a_bad_header_is_refused",
            WIRE + "test_each_field_must_be_there_and_no_other",
            "tests/server/test_coordinator.py::test_a_site_that_does_not_fit_takes_no_part",
            "tests/privacy/test_ledger_faults.py::test_a_later_format_is_an_error",
            "tests/client/test_gate.py::test_another_bundle_does_not_come_in",
        ],
    ),
    42: (
        "an agent that calls nobody",
        [
            "tests/rounds/test_fault_list.py::test_a_site_at_work_calls_nobody",
            "tests/client/test_gate.py::test_only_this_machine_is_let_out",
            "tests/client/test_thin.py::test_nothing_but_a_unix_socket_is_dialled",
            "tests/rounds/test_seal.py::test_nothing_listens_but_what_is_documented",
        ],
    ),
}
"""By the plan's numbers."""

LACKS: dict[int, str] = {
    20: "a coordinator cannot send frozen weights or layers at all: of the base nothing travels; "
    "full-weight federations trust the arrays they are sent",
    21: "this version has no secure aggregation; a site whose policy asks for it refuses all",
    22: "a manifest has no date of expiry: what a site approved holds until it is withdrawn; no "
    "system calls are traced, but the records are gone in the tests where none may be read",
    26: "no certificate signed with SHA-1 and no TLS 1.0: OpenSSL's own level refuses both",
    27: "no secure aggregation to be left out of",
    41: "no older release exists yet: versions are numbers in a header, not two packages that meet",
    42: "no network namespace: Python's own audit of sockets stands for it, and gRPC's C core is "
    "out of its sight",
}
"""What the tests named do not show, or why there are none."""
