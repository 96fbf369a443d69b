# SPDX-License-Identifier: GPL-2.0-or-later
"""Bugs that a change could introduce one day, each with a test that must then fail.

A bug names the function that it goes into, not the module, so that modules can move.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """One bug.

    function: its qualified name within its module, e.g. "GuardServer.serve". Several modules may have a
    function of that name; just one of them may hold old, and just once, which new replaces.
    test: below tests/, as pytest names it; it is one of those that `make test` runs.
    """

    name: str
    function: str
    old: str
    new: str
    test: str


FAILURES = "integration/test_failures.py::"
KNOWN = "integration/test_known_moment.py::"
EXPLORED = "exploration/test_exploration.py::test_a_sample_of_all_interruptions"
COMMIT = "unit/repository/test_commit.py::"
COPY = "unit/transfer/test_copy.py::"
HISTORY = "unit/repository/test_history.py::"
EXTENTS = "unit/transfer/test_extents.py::"
CLUSTER_MAP = "unit/transfer/test_cluster_map.py::"
FLEET = "unit/operations/test_fleet.py::"
SUMMARY = "unit/repository/test_summary.py::"
ROUTINE = "unit/operations/test_routine.py::"
GUARD = "unit/vm/test_guard.py::"
IOTHREAD = (
    "integration/test_guest.py::"
    "test_sigkill_in_mid_copy_leaves_a_guest_on_an_iothread_alive[oldest-virtio-blk-pci-5]"
)
REMOVE = "unit/operations/test_remove_vm.py::"
REPORT_PAGE = "unit/outcome/test_html_page.py::"
LAYER = "unit/operations/test_backup_disk.py::test_nothing_that_may_differ_from_the_parent_is_left_out"
REFUSED = "test_a_transaction_that_qemu_refuses_is_rolled_back_with_the_guest_thawed[simulator]"
WRITER = "unit/images/test_qcow2_writer.py::"
TABLES = "unit/images/test_qcow2_check.py::"
SIMULATED_YEAR = "test_full_and_five_incrementals_under_writes_equal_their_moments[simulator]"

LIBVIRT = "unit/vm/libvirt/"
SOME_STEPS = "integration/test_every_step.py::test_some_steps"

BUGS = (
    Bug(
        "what a killed run left in the images of a VM that is off is not undone",
        "resolve",
        "            done += recovery.resolve_bitmaps(daemon.monitor, facts)\n",
        "            pass\n",
        SOME_STEPS + "[images-SIGKILL]",
    ),
    Bug(
        "a job of libvirt is ended while clients of a line that was cut are in their handshake",
        "RemoteProgram.end",
        "            self._leave_handshakes()\n",
        "            pass\n",
        SOME_STEPS + "[libvirt-ssh-cut]",
    ),
    Bug(
        "a mount over a name with a space is taken for none",
        "is_listed",
        "_ESCAPED.sub(_unescaped, place)",
        "place",
        "unit/operations/test_mount.py::test_a_mount_is_listed_whatever_its_name_and_without_being_touched",
    ),
    Bug(
        "a checkpoint of libvirt is used for another image",
        "Checkpoint.is_of",
        "return bool(then and files and (then[0] in files or files[0] in then))",
        "return True",
        LIBVIRT + "test_libvirt_checkpoints.py::test_a_bitmap_is_not_used_for_another_image",
    ),
    Bug(
        "libvirt does not know of a bitmap that a killed run made in the image of a domain that is off",
        "OffSession.hand_over",
        """checkpoints.redefine(self._off.connection, self._described(name, recorded))
        off_checkpoints.make(self._off.daemon, recorded, name)""",
        """off_checkpoints.make(self._off.daemon, recorded, name)
        checkpoints.redefine(self._off.connection, self._described(name, recorded))""",
        LIBVIRT + "test_off_domains.py::test_libvirt_notes_a_checkpoint_before_its_bitmaps_are_made",
    ),
    Bug(
        "a bitmap with a gap below it is believed while a domain is off",
        "recorded",
        "if gap or other_size or not all(map(_usable, there)):",
        "if other_size or not all(map(_usable, there)):",
        LIBVIRT + "test_off_domains.py::test_only_bitmaps_without_a_gap_tell_what_changed",
    ),
    Bug(
        "a client in its handshake is taken for one that QEMU has let in",
        "HandshakeReader.read",
        "self._last = magic == _REPLY_MAGIC and option == _OPT_GO and kind == _REP_ACK",
        "self._last = magic == _REPLY_MAGIC and kind == _REP_ACK",
        "unit/vm/remote/test_relay.py::test_replies_before_the_last_do_not_end_a_handshake",
    ),
    Bug(
        "a backup that libvirt is about to begin is taken for none",
        "end",
        "    await_quiet(connection, drain)\n",
        "",
        LIBVIRT + "test_libvirt_connection.py::test_a_backup_that_is_about_to_begin_is_waited_for",
    ),
    Bug(
        "the checkpoint of a failed run becomes the base of the next",
        "plan",
        "        if one not in valid:\n",
        "        if one not in valid and not valid:\n",
        LIBVIRT
        + "test_libvirt_checkpoints.py::test_the_checkpoint_of_an_unfinished_run_goes_and_its_base_stays",
    ),
    Bug(
        "a backup job of libvirt is aborted while clients are in their handshake",
        "end",
        "    hang_up()\n",
        "    hang_up\n",
        LIBVIRT
        + "test_libvirt_connection.py::"
        + "test_a_job_of_ours_is_aborted_when_clients_in_their_handshake_have_left",
    ),
    Bug(
        "each step of a run follows the chain again",
        "CheckedChains.layers",
        "if key not in self._layers:",
        "if True:",
        "unit/repository/test_checked_chains.py::test_a_run_opens_each_file_of_its_chain_once",
    ),
    Bug(
        "batches that are not in order are written together",
        "_ascending",
        "if found and found[-1][-1].numbers[-1] < batch.numbers[0]:",
        "if found:",
        COPY + "test_scattered_clusters_and_a_short_last_one_come_padded_to_their_places",
    ),
    Bug(
        "no thaw after a transaction that failed",
        "_Run._thawed_at_the_end",
        "        try:\n            yield thawed\n        finally:\n"
        "            thawed.append(self.session.thaw())\n",
        "        yield thawed\n        thawed.append(self.session.thaw())\n",
        FAILURES + REFUSED,
    ),
    Bug(
        "thaw before the transaction's reply",
        "_Run._start_frozen",
        "            self.session.start()\n        return thawed[0]\n",
        "        self.session.start()\n        return thawed[0]\n",
        FAILURES + "test_a_freeze_that_somebody_ended_early_is_not_called_consistent[simulator]",
    ),
    Bug(
        "the guard does not thaw when its run dies",
        "GuardServer.take_over",
        "        self._freeze.thaw_for_good()\n        while",
        "        while",
        GUARD + "test_sigkill_of_the_run_leaves_the_guest_thawed",
    ),
    Bug(
        "the freeze budget is not looked at",
        "GuardServer.serve",
        "            self._freeze.thaw_when_due()\n",
        "",
        GUARD + "test_the_budget_ends_the_freeze_and_the_run_is_told",
    ),
    Bug(
        "a guest that somebody else froze is thawed",
        "GuardClient.freeze",
        "        self._ping()\n        self._due = ",
        "        self._due = ",
        GUARD + "test_a_guest_frozen_by_somebody_else_is_refused_and_never_thawed",
    ),
    Bug(
        "a point is committed before the history has it",
        "PendingPoint.commit",
        "            history.record(self.directory, "
        'PointEvent("committed", self.point, manifest.checksum))\n',
        "",
        HISTORY + "test_points_that_were_removed_are_named[newest]",
    ),
    Bug(
        "a dropped point is not written down",
        "_Steps.retire",
        '                history.record(self.directory.path, PointEvent("dropped", point))\n',
        "",
        HISTORY + "test_what_a_prune_drops_and_changes_is_no_problem",
    ),
    Bug(
        "an unfinished point goes before the history has it",
        "PendingPoint.drop",
        "                history.undo(self.directory, self.point)\n",
        "",
        HISTORY + "test_a_death_at_any_step_raises_no_false_alarm_and_hides_no_loss",
    ),
    Bug(
        "a run that met damage is silent",
        "_run",
        "            raise ending.failure\n",
        "            pass\n",
        "integration/test_missing_points.py::test_reason_and_damage_of_each_disk_are_in_the_document",
    ),
    Bug(
        "the base bitmap is retired before the commit",
        "_Run._take",
        '        self._begin("commit")\n',
        '        self._begin("commit")\n'
        "        for one in self.plan.disks:\n"
        "            for name in one.bitmaps:\n"
        '                old = {"node": one.disk.node, "name": name}\n'
        '                self.session._monitor.execute("block-dirty-bitmap-remove", old)\n',
        EXPLORED + "[incremental]",
    ),
    Bug(
        "base bitmaps are retired for some disks only",
        "resolve_bitmaps",
        "            actions += plan.actions\n",
        "            actions = actions or [*plan.actions]\n",
        KNOWN + SIMULATED_YEAR,
    ),
    Bug(
        "what an unfinished run recorded is thrown away",
        "_roll_back",
        "    return [merge, *(()",
        "    return [*(()",
        EXPLORED + "[incremental]",
    ),
    Bug(
        "copied from the active node",
        "QmpSession.exports",
        "            nbd_export.ExportSpec(node, one.disk.node, bitmap)\n",
        "            nbd_export.ExportSpec(one.disk.node, one.disk.node, bitmap)\n",
        KNOWN + SIMULATED_YEAR,
    ),
    Bug(
        "bitmaps are looked for at the view's node",
        "QmpSession.exports",
        "            nbd_export.ExportSpec(node, one.disk.node, bitmap)\n",
        "            nbd_export.ExportSpec(node, node, bitmap)\n",
        KNOWN + "test_dirty_zeroes_are_stored_as_zeroes[simulator]",
    ),
    Bug(
        "the second disk is read with the first one's bitmap",
        "QmpSession._changes",
        "        return [_change(one, merged) for one in self._disks]\n",
        "        return [_change(self._disks[0] if one.bases else one, merged) for one in self._disks]\n",
        KNOWN + SIMULATED_YEAR,
    ),
    Bug(
        "extents are not clipped",
        "clip",
        "np.minimum(stops, asked)",
        "stops",
        EXTENTS + "test_long_is_clipped",
    ),
    Bug(
        "a short block status is taken for the end",
        "query_extents",
        "    while offset < size:\n",
        "    while offset == start:\n",
        EXTENTS + "test_short_is_asked_again_and_not_taken_for_the_end",
    ),
    Bug(
        "the dirty bit is inverted",
        "_find_clusters",
        "(found.flags[1] & DIRTY) != 0",
        "(found.flags[1] & DIRTY) == 0",
        LAYER,
    ),
    Bug(
        "zeroes are skipped",
        "_find_clusters",
        "        cluster_map.zero(found.offsets[zero], found.lengths[zero])\n",
        "",
        LAYER,
    ),
    Bug(
        "the last cluster is dropped if it is no whole one",
        "ClusterMap.data",
        "-(-(offsets + lengths) // CLUSTER_BYTES)",
        "(offsets + lengths) // CLUSTER_BYTES",
        CLUSTER_MAP + "test_a_map_covers_all_that_was_named_and_calls_zero_only_what_is",
    ),
    Bug(
        "offsets of 32 bits",
        "NbdReader.start",
        "buffer[at : at + length]), offset)]",
        "buffer[at : at + length]), offset & 0xFFFFFFFF)]",
        COPY + "test_data_beyond_4_gib_arrives_where_it_belongs",
    ),
    Bug(
        "a read error is swallowed",
        "Connection.completed",
        "            return bool(self.handle.aio_command_completed(cookie))\n"
        "        except nbd.Error as err:\n            raise self.explained(err) from err\n",
        "            return bool(self.handle.aio_command_completed(cookie))\n"
        "        except nbd.Error:\n            return True\n",
        COPY + "test_a_read_error_is_fatal_and_never_zeroes",
    ),
    Bug(
        "what changed is taken for unchanged",
        "DedupFilter.__call__",
        "        zero = clusters.is_zero(found)\n",
        "        zero = clusters.is_zero(found)\n        new[new.argmax()] = False\n",
        "unit/transfer/test_dedup_filter.py::test_what_passes_is_what_differs_from_the_layers_below",
    ),
    Bug(
        "a cluster that is zero in part is taken for zeroes",
        "ClusterMap.zero",
        "self._mark(touched, touched + 1, _DATA)",
        "self._mark(touched, touched + 1, _ZERO)",
        CLUSTER_MAP + "test_a_map_covers_all_that_was_named_and_calls_zero_only_what_is",
    ),
    Bug(
        "a failed fsync is tried again",
        "_sync",
        "        os.fsync(descriptor)\n        if forget:\n",
        "        try:\n            os.fsync(descriptor)\n        except OSError:\n"
        "            os.fsync(descriptor)\n        if forget:\n",
        COMMIT + "test_a_failed_sync_is_never_a_commit",
    ),
    Bug(
        "the directory is not synced after the rename",
        "rename",
        "    source.rename(target)\n    try:\n        sync_directory(target.parent)\n",
        "    source.rename(target)\n    try:\n        pass\n",
        COMMIT + "test_all_that_the_manifest_names_is_synced_before_the_rename_and_the_parent_after_it",
    ),
    Bug(
        "the manifest comes before the data",
        "PendingPoint.commit",
        "            for entry in manifest.disks:\n"
        '                durable.sync_file(self.path / f"{entry.name}.qcow2")\n'
        '                durable.sync_file(self.path / f"{entry.name}.digests")\n'
        "            stored_files.sync(self.path, manifest.definition)\n"
        "            durable.write_new(self.path / manifests.FILE_NAME, manifest.to_json())\n",
        "            durable.write_new(self.path / manifests.FILE_NAME, manifest.to_json())\n"
        "            for entry in manifest.disks:\n"
        '                durable.sync_file(self.path / f"{entry.name}.qcow2")\n'
        '                durable.sync_file(self.path / f"{entry.name}.digests")\n'
        "            stored_files.sync(self.path, manifest.definition)\n",
        COMMIT + "test_all_that_the_manifest_names_is_synced_before_the_rename_and_the_parent_after_it",
    ),
    Bug(
        "a wrong backing link",
        "LayerCopier.copy_disk",
        'f"../{one.base}/{disk.name}.qcow2" if one.base else None',
        'f"../{self.partial.point}/{disk.name}.qcow2" if one.base else None',
        KNOWN + "test_dirty_zeroes_are_stored_as_zeroes[simulator]",
    ),
    Bug(
        "the base is chosen by the age of its directory",
        "newest_with",
        "for point in reversed(points) if",
        "for point in sorted(points, key=lambda one: -one.path.stat().st_mtime_ns) if",
        "unit/operations/test_backup_plan.py"
        "::test_the_base_is_the_newest_point_that_holds_the_disk_whichever_directory_was_touched_last",
    ),
    Bug(
        "recovery drops a committed point, too",
        "drop_leftover_files",
        "        partial.drop()\n",
        "        partial.drop()\n        __import__('shutil').rmtree(facts.directory.point('latest').path)\n",
        EXPLORED + "[incremental]",
    ),
    Bug(
        "recovery leaves the job",
        "teardown",
        "            _end_job(monitor, name)\n"
        '            done.append(f"ended the job {name}")\n'
        '        _until(lambda: not _ours(monitor, namespace, "query-jobs", "id"), "its jobs", '
        "patience_seconds)\n",
        "            pass\n",
        FAILURES + "test_sigkill_in_mid_copy_is_undone_by_the_next_run[simulator]",
    ),
    Bug(
        "the lock is let go before the guard has done its work",
        "GuardClient.launch",
        "_spawn(arguments, (its.fileno(), lock))",
        "_spawn(arguments, (its.fileno(),))",
        GUARD + "test_the_guard_of_a_dead_run_holds_the_lock_until_the_guest_is_thawed",
    ),
    Bug(
        "recover takes no lock",
        "recover",
        "        with directory.lock(), summary.renewed(directory):\n            thawed = ",
        "        with summary.renewed(directory):\n            thawed = ",
        FAILURES + "test_a_second_run_is_told_that_the_first_one_works[simulator]",
    ),
    Bug(
        "our clients leave before the export goes",
        "teardown",
        "    for name in ours:\n        _unless_gone(",
        "    clients.close()\n    for name in ours:\n        _unless_gone(",
        IOTHREAD,
    ),
    Bug(
        "the guard lets go of the sockets before the export goes",
        "GuardServer.take_over",
        "        while not self._taken_down():\n",
        "        self._held.release()\n        while not self._taken_down():\n",
        IOTHREAD,
    ),
    Bug(
        "the agent's time-out is taken for success",
        "Agent._command",
        '            raise AgentTimeout(f"the guest agent took',
        '            return 1\n            raise AgentTimeout(f"the guest agent took',
        FAILURES + "test_a_freeze_that_is_not_answered_is_thawed_and_the_run_rolled_back[simulator]",
    ),
    Bug(
        "an inconsistent bitmap is taken for an empty one",
        "bitmap_error",
        '        return "its bitmap is inconsistent (QEMU did not end cleanly)"\n',
        '        return ""\n',
        "integration/test_topology.py::test_after_a_crash_of_qemu_the_disks_are_scanned_and_little_more_than"
        "_the_change_is_stored[simulator]",
    ),
    Bug(
        "the bitmap of a disk that other VMs write to is trusted",
        "bitmap_error",
        "    if disk.open_to_others:\n",
        "    if False:\n",
        "integration/test_disks_missing_or_shared.py::"
        "test_what_another_vm_writes_to_a_shared_disk_is_in_the_next_incremental[oldest]",
    ),
    Bug(
        "a point that an older copy of the repository knows nothing of is not missed",
        "DirectoryFacts.is_lost",
        "        return not known and not audit.is_unfinished(self.directory, point)\n",
        "        return False\n",
        "integration/test_missing_points.py::"
        "test_the_loss_of_all_that_there_was_of_a_vm_is_told_by_its_bitmaps",
    ),
    Bug(
        "a disk of a domain whose name another one has is left out",
        "stored_name",
        "    if name in taken:\n        raise Refused(\n",
        "    if name in taken:\n        raise Failed(\n",
        LIBVIRT + "test_off_domains.py::"
        "test_a_disk_whose_name_cannot_be_is_refused_and_not_left_out[-names0-two disks of the VM are both "
        "called vdb]",
    ),
    Bug(
        "a run that copied some disks only ends with 0",
        "_Run._copied",
        "            entries = side_by_side(tasks, at_once=DISKS_AT_ONCE, check=check)\n",
        "            entries = ()\n"
        "            for task in tasks:\n"
        "                with __import__('contextlib').suppress(Failed):\n"
        "                    entries += side_by_side([task], at_once=DISKS_AT_ONCE, check=check)\n",
        FAILURES + "test_a_connection_dropped_in_mid_copy_is_a_failed_run[simulator-exp1]",
    ),
    Bug(
        "damaged data is restored",
        "VerifyFilter._compare",
        "        if len(wrong):\n",
        "        if not len(wrong):\n",
        "unit/operations/test_restore_damaged.py::test_damaged_data_is_refused_by_range_and_nothing_is_left",
    ),
    Bug(
        "a stored bitmap is trusted wherever the data lie",
        "Disk.trusts",
        "        return not (self.apart and bitmap.persistent)\n",
        "        return True\n",
        "unit/vm/test_block_graph.py::test_of_a_disk_with_a_data_file_only_a_bitmap_of_this_qemus_life_is_used",
    ),
    Bug(
        "disks that are served to other VMs are not looked at",
        "writers",
        "        elif _program(process).startswith(_SERVERS) and",
        "        elif False and",
        "integration/test_filling.py::test_a_restore_ends_before_it_takes_the_room_of_a_disk_that_is_served"
        "[installed-qemu-nbd]",
    ),
    Bug(
        "the process of the VM at hand is not looked at",
        "Filling.who",
        "{**dict(open_files.writers()), **known}",
        "{**dict(open_files.writers())}",
        "unit/vm/test_shared_file_systems.py::test_the_process_of_the_vm_at_hand_counts_although_it_is_no_emulator",
    ),
    Bug(
        "scratch files are let go of as they are",
        "teardown",
        "    clients.free_scratch()\n",
        "    pass\n",
        "integration/test_held_room.py::"
        "test_the_room_is_given_back_by_the_run_itself_where_it_can_not_reach_qemus_process",
    ),
    Bug(
        "QEMU is given names that can be exchanged",
        "OpenImage.name",
        '        return f"/proc/self/fd/{self.descriptor}"\n',
        "        return str(self.path)\n",
        "unit/images/test_open_image.py::test_what_is_served_is_what_was_checked",
    ),
    Bug(
        "a link in the place of an image is followed",
        "_opened",
        "flags | os.O_NOFOLLOW | os.O_NONBLOCK",
        "flags | os.O_NONBLOCK",
        "unit/images/test_open_image.py::test_only_a_plain_file_is_opened",
    ),
    Bug(
        "root restores into anybody's directory",
        "resolve",
        "    if os.geteuid() != _ROOT:\n",
        "    if True:\n",
        "unit/images/test_open_image.py::test_a_directory_that_is_turned_after_the_first_look_is_refused_before_a_file_is_made",
    ),
    Bug(
        "an incremental makes a repository",
        "_repository",
        '    if options.kind != "full" or target.has_repository():\n',
        "    if target.has_repository():\n",
        "integration/test_first_full.py::test_an_incremental_makes_none_and_names_the_command_that_does",
    ),
    Bug(
        "configured rules are added to those of the command line",
        "Policy.of",
        "        said = typed or configured\n",
        "        said = configured | typed\n",
        "unit/cli/test_all_vms.py"
        "::test_the_command_lines_rules_are_the_whole_policy_and_the_unused_ones_are_told",
    ),
    Bug(
        "a configuration that others may write is believed",
        "_refuse_writable",
        "    if path_walk.others_may_write(status):\n",
        "    if status.st_mode & stat.S_ISUID:\n",
        "unit/system/test_trusted.py::test_a_file_that_others_may_write_is_not_believed",
    ),
    Bug(
        "a layer that ends shows what lies behind its end",
        "LayeredImage._read",
        "            if shown < CLUSTER_BYTES:\n",
        "            if shown < 0:\n",
        "unit/images/test_layered_image.py::test_any_chain_is_read_as_qemu_reads_it",
    ),
    Bug(
        "an older layer hides a newer one",
        "_overlay",
        "        new = (layer[:end] == _NO_LAYER) & (",
        "        new = (layer[:end] >= _NO_LAYER) & (",
        "unit/images/test_layered_image.py::test_any_chain_is_read_as_qemu_reads_it",
    ),
    Bug(
        "a prune goes by a manifest that has been replaced",
        "Survey.update",
        "        for point in names & changed if changed is not None else ():\n",
        "        for point in ():\n",
        "unit/operations/test_growth.py::test_a_survey_sees_all_that_others_change",
    ),
    Bug(
        "the last cluster of a device is written beyond the end of the disk",
        "RawWriter._write",
        "        if self._onto_device:\n",
        "        if not self._onto_device:\n",
        "unit/targets/test_raw_writer.py::test_a_device_gets_the_disk_and_keeps_what_is_behind_it",
    ),
    Bug(
        "an image counts before what it leads to is durable",
        "Qcow2Writer.finish",
        "            self._file.sync()\n            header[: len(_MAGIC)] = _MAGIC\n",
        "            header[: len(_MAGIC)] = _MAGIC\n",
        WRITER + "test_after_a_power_failure_it_is_complete_or_no_image",
    ),
    Bug(
        "an image is finished though a write of it failed",
        "Qcow2Writer._call",
        "            self._failed = True\n",
        "            self._failed = False\n",
        WRITER + "test_no_image_comes_of_a_write_that_failed",
    ),
    Bug(
        "an L2 table that was put away is begun anew",
        "Qcow2Writer._get",
        "            if offset and ",
        "            if not offset and ",
        WRITER + "test_clusters_in_any_order_from_several_threads_with_few_tables_in_memory",
    ),
    Bug(
        "a write that hung goes on in another file",
        "_DirectFile.close",
        "            if not self._users:\n",
        "            if True:\n",
        "unit/system/test_direct_io.py::test_a_write_that_hung_does_not_go_on_in_another_file",
    ),
    Bug(
        "what is cut off of a table counts as empty",
        "TableFile.read_table",
        "np.full(entries, LOST, np.uint64)",
        "np.zeros(entries, np.uint64)",
        TABLES + "test_what_is_cut_off_of_a_table_is_lost_and_not_empty",
    ),
    Bug(
        "an entry may lead beyond the end of the file",
        "TableFile.begins",
        "aligned & (offset < np.uint64(self.file_bytes))",
        "aligned",
        TABLES + "test_a_damaged_entry_costs_its_own_cluster_and_no_other",
    ),
    Bug(
        "a used cluster without a reference is sound",
        "_Check._compare",
        "(used > stored) | (used > 1)",
        "used > 1",
        TABLES + "test_errors_and_leaks_are_counted_as_qemu_counts_them",
    ),
    Bug(
        "older points are dropped after a backup that failed",
        "_Work.prune",
        "        if taken.error is not None:\n",
        "        if self.stop.requested:\n",
        ROUTINE + "test_after_a_backup_that_failed_nothing_is_dropped_but_the_rest_is_verified",
    ),
    Bug(
        "a policy without rules prunes",
        "_Work.prune",
        "        if rules.hold_nothing():\n",
        "        if rules is None:\n",
        ROUTINE + "test_without_rules_nothing_is_pruned_and_without_a_percentage_nothing_verified",
    ),
    Bug(
        "one monitor is spoken to by two",
        "next_job",
        "            if one.monitor not in busy\n            and storages",
        "            if storages",
        FLEET + "test_one_monitor_is_never_spoken_to_by_two",
    ),
    Bug(
        "the processes of a run that was killed go on",
        "signalled",
        "        _LIBC.prctl(_PR_SET_PDEATHSIG, number)\n",
        "        pass\n",
        FLEET + "test_a_parent_that_is_killed_has_its_children_roll_back",
    ),
    Bug(
        "a killed run passes for one that was rolled back",
        "_without_document",
        "    if result.code is not None and result.code > 0:\n",
        "    if result.code is not None:\n",
        "unit/cli/test_run_command.py::test_a_process_without_a_document_is_told_by_how_it_ended",
    ),
    Bug(
        "a lock that was waited for counts under a name that is gone",
        "VmDirectory.lock",
        "            self._refuse_moved(descriptor)\n",
        "",
        REMOVE + "test_a_run_that_waited_for_the_lock_of_a_renamed_vm_does_not_begin",
    ),
    Bug(
        "a VM is renamed before its points may bear the old name",
        "rename",
        "        former_names.add(directory.path, directory.name, points[-1])\n",
        "        pass\n",
        REMOVE + "test_a_renamed_vm_has_its_points_and_they_verify",
    ),
    Bug(
        "a point that was dropped makes no beginning of an id ambiguous",
        "_choose",
        "(*current, *retired))",
        "(*current,))",
        "unit/operations/test_delete.py::test_a_dropped_point_still_makes_a_beginning_ambiguous",
    ),
    Bug(
        "a run notes its step while the guest is frozen",
        "RunContext.enter",
        "        self.on_step(name)\n",
        "        self.on_step(name)\n"
        "        if self.activity:\n"
        "            self.activity.step(name, self.point)\n",
        "integration/test_run_context.py::"
        "test_status_tells_what_a_running_backup_does_and_nothing_is_noted_while_the_guest_is_frozen[simulator]",
    ),
    Bug(
        "an NBD client leaves QEMU when the line to its host is cut",
        "Relay._to_qemu",
        "        if not self._outlives:\n",
        "        if self.qemu:\n",
        "unit/vm/remote/test_relay.py"
        "::test_an_nbd_client_stays_with_qemu_when_the_line_is_cut_and_takes_what_qemu_says",
    ),
    Bug(
        "the late answer of a host is taken for that to the next request",
        "Channel.ask",
        "            if self._broken:\n",
        "            if not self._connection:\n",
        "unit/vm/remote/test_channel.py::test_an_answer_that_does_not_come_is_not_taken_for_the_next_one",
    ),
    Bug(
        "a monitor on TCP of another host is believed to be private",
        "Address.loopback",
        "if self.path is not None or self.host == ",
        "if self.path is not None or self.host or self.host == ",
        "unit/system/test_address.py"
        "::test_only_the_loopback_and_ssh_keep_what_is_said_to_themselves[tcp:host:1-False]",
    ),
    Bug(
        "a report with a secret of the configuration in its logs",
        "Redaction.text",
        "text = text.replace(secret, HIDDEN)",
        "pass",
        "unit/cli/test_problem_report.py::test_the_report_has_what_is_needed_and_no_secret",
    ),
    Bug(
        "a report with a file of root's that somebody has linked into /tmp",
        "_is_ours",
        " and status.st_nlink == 1",
        "",
        "unit/cli/test_problem_report.py::"
        "test_what_somebody_put_beside_the_logs_is_not_in_the_report[a hard link]",
    ),
    Bug(
        "a demo of the Debian package that finds no backupctl",
        "own_environment",
        '        "PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH")))),\n',
        "",
        "packages/test_deb.py::test_demo_and_drills_find_the_modules_of_the_package_wherever_they_are_called",
    ),
    Bug(
        "a name in a report becomes HTML",
        "text",
        "html.escape(clean(said)) if _SPECIAL",
        "clean(said) if _SPECIAL",
        REPORT_PAGE + "test_no_text_from_outside_becomes_a_tag_or_an_attribute",
    ),
    Bug(
        "a report replaces a disk image",
        "_may_replace",
        "    if begin != mark and not force:\n",
        "    if not begin and not force:\n",
        "unit/operations/test_report.py::test_any_other_file_is_replaced_only_if_that_is_asked_for",
    ),
    Bug(
        "a map shows nothing where little is stored",
        "shares",
        "np.maximum(1, stored * 255 // np.maximum(every, 1))",
        "stored * 255 // np.maximum(every, 1)",
        "unit/digests/test_regions.py::test_a_single_cluster_of_a_large_part_is_still_shown",
    ),
    Bug(
        "a served report is shown to whoever asks",
        "_Handler.find",
        "        return found.get(name) if known else None\n",
        "        return found.get(name)\n",
        "unit/outcome/test_html_live.py::test_without_the_token_there_is_nothing",
    ),
    Bug(
        "a foreign page in a browser reads what is served",
        "Handler._answer",
        "        if not named or not all(map(self._is_ours, named)):\n",
        "        if not named:\n",
        "unit/monitoring/test_scrape.py::test_a_foreign_host_name_for_this_address_is_refused[evil.example]",
    ),
    Bug(
        "metrics are made anew for whoever asks",
        "Metrics.content",
        "            if time.monotonic() >= self._until:\n",
        "            if True:\n",
        "unit/monitoring/test_scrape.py::test_who_asks_often_gets_what_is_kept",
    ),
    Bug(
        "a name of a guest leads out of the target directory",
        "check_name",
        '    if name in (b"", b".", b".."):\n',
        "    if not name:\n",
        "unit/targets/test_extraction.py::test_a_name_that_is_not_one_plain_component_is_refused",
    ),
    Bug(
        "committed transactions of a journal are ignored",
        "_committed",
        "        elif kind == _COMMIT:\n            yield current\n",
        "        elif kind == _COMMIT:\n            pass\n",
        "unit/filesystems/test_ext.py::test_what_the_journal_has_committed_is_read",
    ),
    Bug(
        "clusters of a guest's files are used unverified",
        "PointDisk._verified",
        "        if len(wrong):\n",
        "        if len(wrong) > len(found):\n",
        "unit/operations/test_files.py::test_what_does_not_match_its_digest_is_not_used",
    ),
    Bug(
        "a VM that boots by UEFI gets its variables as a disk, and none as variables",
        "served",
        "variables = disks.pop() if chip else wanted.uefi.content",
        "variables = wanted.uefi.content",
        "unit/operations/test_uefi.py::test_the_vm_gets_the_variables_beside_its_disks[as a disk]",
    ),
    Bug(
        "UEFI variables of any size start a firmware",
        "code_for",
        "if (name := _CODE.get(variables_bytes)) is None:",
        'if (name := _CODE.get(variables_bytes, "OVMF_CODE_4M.fd")) is None:',
        "unit/vm/test_trial.py::test_variables_of_an_unknown_size_start_no_firmware",
    ),
    Bug(
        "a chip with the firmware's code is taken for the UEFI variables",
        "of_point",
        "chip = min(",
        "chip = max(",
        "unit/operations/test_uefi.py::test_of_two_chips_that_were_stored_the_one_with_the_code_is_not_taken",
    ),
    Bug(
        "the QEMU of a restore test may gain rights",
        "prepared",
        "if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):",
        "if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0) > 0:",
        "unit/vm/test_trial.py::test_a_confined_child_has_no_rights_of_root",
    ),
    Bug(
        "a monitor that is silent is taken for a VM that is off",
        "_opened",
        "            if not err.nobody_listens:\n                raise\n",
        "",
        "unit/vm/test_open_driver.py::test_a_monitor_that_is_silent_is_never_taken_for_a_vm_that_is_off",
    ),
    Bug(
        "a daemon on the images of another host is killed where the line is cut, and bitmaps are lost",
        "ImageServer.close",
        "        self.do_end()\n",
        "        self.do_kill()\n",
        "unit/vm/remote/test_remote_images.py::test_a_line_that_is_cut_ends_the_daemon_in_good_order",
    ),
    Bug(
        "a run on images of another host does not wait for the daemon of the one before",
        "RemoteProgram.__init__",
        '            if options.get("guard", True):\n',
        '            if options.get("guard", not options.get("images")):\n',
        "unit/vm/remote/test_remote_images.py::test_another_run_waits_until_the_daemon_has_ended",
    ),
    Bug(
        "an image of this host is read for a VM of another",
        "_refuse_images_elsewhere",
        "(one.host and one.host[1:]) == (host and host[1:])",
        "one.host is None",
        "unit/cli/test_image_texts.py::test_images_that_are_not_on_the_host_of_their_vm_are_refused",
    ),
    Bug(
        "a raw image that a VM writes to is backed up",
        "keep_from_writers",
        "        if not _is_free(descriptor, byte):\n",
        "        if not byte:\n",
        "unit/system/test_image_lock.py::test_a_writer_or_one_that_lets_nobody_read_is_noticed",
    ),
    Bug(
        "two users read the images of one VM at once, so that one of them cannot store its bitmaps",
        "claim",
        "    if _is_free(descriptor, _OURS):\n",
        "    if _OURS:\n",
        "unit/system/test_image_lock.py::test_a_backup_claims_an_image_alone_until_it_closes_it_and_needs_no_"
        "right_to_write",
    ),
    Bug(
        "a program on another host that cannot begin leaves its lock there",
        "RemoteProgram.__init__",
        "                    self._lock.remove()\n",
        "                    pass\n",
        "unit/vm/remote/test_program.py::test_a_program_that_cannot_begin_leaves_no_lock_and_no_directory",
    ),
    Bug(
        "an image leads to a file of the host",
        "_check_header",
        "    if below is None and header.backing:\n",
        "    if below is None and header.corrupt:\n",
        "unit/vm/test_offline_images.py::test_a_header_that_leads_elsewhere_or_cannot_be_trusted_is_refused",
    ),
    Bug(
        "a skipped backup is followed by a prune",
        "_Work.prune",
        "        if taken.skipped:",
        "        if taken.skipped and False:",
        ROUTINE + "test_after_a_backup_that_was_skipped_nothing_is_dropped",
    ),
    Bug(
        "a point that has changed is shown as the summary has it",
        "_sorted_out",
        "        if one is not None and identity == one.identity:\n",
        "        if one is not None:\n",
        SUMMARY + "test_what_has_changed_since_is_read_anew",
    ),
    Bug(
        "the summary of another VM is believed",
        "_parsed",
        "    if (found.vm, found.repository) != (directory.name, directory.repository):\n",
        "    if found.repository != directory.repository:\n",
        SUMMARY + "test_a_file_that_can_not_be_used_is_as_good_as_none[another VM]",
    ),
    Bug(
        "a change in the tick in which a summary was sealed is missed",
        "is_whole",
        " and _stamp(found) == stamp\n",
        " and _stamp(found)[::2] == stamp[::2]\n",
        SUMMARY + "test_a_change_in_the_tick_in_which_the_seal_was_made_is_seen[0]",
    ),
    Bug(
        "a point that was put in another's place is shown as the one before",
        "_is_as_sealed",
        "    return seal.is_whole(directory.path, stamp)\n",
        "    return directory.path.is_dir()\n",
        SUMMARY + "test_a_point_that_comes_goes_or_is_exchanged_breaks_the_seal[exchanged]",
    ),
    Bug(
        "a point that is protected during a run is shown as it was",
        "_unsealed",
        "    finally:\n        directory.break_seal()\n",
        "    finally:\n        pass\n",
        SUMMARY + "test_a_point_protected_while_a_run_seals_is_shown_as_protected",
    ),
    Bug(
        "a manifest that vanishes below the newest point is not told",
        "_is_newest_as_it_was",
        "    looked_at = [newest, *(known[point] for point in needed if point in known)]\n",
        "    looked_at = [newest]\n",
        SUMMARY + "test_a_manifest_that_vanished_below_the_newest_point_is_told_at_once",
    ),
    Bug(
        "a list for programs is held in memory",
        "print_json_list",
        "    for part in parts:\n",
        "    for part in list(parts):\n",
        "unit/cli/test_command_line.py::test_a_list_for_programs_is_written_vm_by_vm",
    ),
    Bug(
        "a second change in one tick of the clock is missed",
        "_renew",
        "_newest_change(one) + _TICK_SECONDS <= begun",
        "_newest_change(one) <= begun",
        SUMMARY + "test_a_point_that_changed_in_this_tick_of_the_clock_is_left_out",
    ),
    Bug(
        "one more VM of a host is worked on than is allowed",
        "next_job",
        "            and hosts.count(one.host) < per_host\n",
        "            and hosts.count(one.host) <= per_host\n",
        FLEET + "test_no_more_than_are_allowed_are_worked_on_at_once_on_each_host",
    ),
    Bug(
        "the definition of a VM is not on stable storage before the commit",
        "PendingPoint.commit",
        "            stored_files.sync(self.path, manifest.definition)\n",
        "",
        "unit/repository/test_stored_files.py::test_all_files_are_durable_before_the_manifest",
    ),
    Bug(
        "a file of a point is read through a link",
        "read",
        "        _refuse_link(point / DIRECTORY)\n",
        "",
        "unit/repository/test_stored_files.py::test_verify_finds_a_file_that_is_not_as_it_was_stored",
    ),
    Bug(
        "a password on QEMU's command line is stored",
        "_names_secret",
        "return bool(_SECRET_NAME.search(name)) and",
        "return bool(_SECRET_NAME.search(name)) and not name and",
        "unit/vm/test_definition.py::test_no_secret_of_the_command_line_is_stored",
    ),
    Bug(
        "a restored VM has the UUID of the old one",
        "_identify",
        "    made = str(uuid.uuid4())\n",
        '    made = root.findtext("uuid", "")\n',
        LIBVIRT + "test_libvirt_definition.py::test_the_new_domain_has_an_identity_of_its_own",
    ),
    Bug(
        "a copy's lock is taken for the guard of a killed run",
        "VmDirectory._holder",
        "        if taker and str(taker) != number:",
        "        if taker and not number:",
        "integration/test_off_site.py::test_a_run_that_meets_a_copy_ends_with_75_and_names_its_process",
    ),
    Bug(
        "what a guest encrypts is called unknown",
        "kind",
        "    for name, offset, magic in _MAGICS:\n",
        "    for name, offset, magic in _MAGICS[:6]:\n",
        "unit/operations/test_files.py::test_what_is_not_supported_is_named_and_so_is_what_reads_it",
    ),
    Bug(
        "a narrow terminal breaks the lines of a table",
        "_narrowed",
        "        if sum(column.width + 2 for column in table) - 2 <= limit:\n",
        "        if sum(column.width for column in table) <= 4 * limit:\n",
        "screens/test_screens.py::test_points",
    ),
)
