"""What the classes of the XenAPI look like: the table that everything generic is made from.

One entry is ``name type qualifier [=default]``; ro can only be read, c can be given at creation, rw can be changed by anybody.
A type is string, int, float, bool, datetime, map (string to string), ``X ref``, ``X refs`` (a set), ``strings``, ``X set``
(a set of enum values) or the name of an enum. ``schema.py`` reads it.
"""

from __future__ import annotations

__all__ = ["CLASSES", "ENUMS", "DERIVED", "TRANSIENT", "SM_SETTERS", "SETTERS"]

CLASSES = {
    "session": """
        uuid string ro; this_host host ref ro; this_user user ref ro; last_active datetime ro; pool bool ro;
        other_config map rw; is_local_superuser bool ro; subject subject ref ro; validation_time datetime ro;
        auth_user_sid string ro; auth_user_name string ro; rbac_permissions strings c; tasks task refs ro;
        parent session ref c; originator string ro; client_certificate bool ro
    """,
    "task": """
        uuid string ro; name_label string ro; name_description string ro;
        allowed_operations task_allowed_operations set ro; current_operations map ro; created datetime ro;
        finished datetime ro; status task_status_type ro; resident_on host ref ro; progress float ro; type string ro;
        result string ro; error_info strings ro; other_config map rw; subtask_of task ref ro; subtasks task refs ro;
        backtrace string ro ="()"
    """,
    "VM": """
        uuid string ro; allowed_operations vm_operations set ro; current_operations map ro; name_label string rw;
        name_description string rw; power_state vm_power_state c =Halted; user_version int rw; is_a_template bool rw;
        is_default_template bool ro; suspend_VDI VDI ref c; resident_on host ref ro;
        scheduled_to_be_resident_on host ref ro; affinity host ref rw; memory_overhead int ro; memory_target int c;
        memory_static_max int c; memory_dynamic_max int c; memory_dynamic_min int c; memory_static_min int c;
        VCPUs_params map rw; VCPUs_max int c; VCPUs_at_startup int c;
        actions_after_softreboot on_softreboot_behavior rw =soft_reboot; actions_after_shutdown on_normal_exit rw;
        actions_after_reboot on_normal_exit rw; actions_after_crash on_crash_behaviour c; consoles console refs ro;
        VIFs VIF refs ro; VBDs VBD refs ro; VUSBs VUSB refs ro; crash_dumps crashdump refs ro; VTPMs VTPM refs ro;
        PV_bootloader string rw; PV_kernel string rw; PV_ramdisk string rw; PV_args string rw;
        PV_bootloader_args string rw; PV_legacy_args string rw; HVM_boot_policy string c; HVM_boot_params map rw;
        HVM_shadow_multiplier float c =1.; platform map rw; PCI_bus string rw; other_config map rw; domid int ro =-1;
        domarch string ro; last_boot_CPU_flags map c; is_control_domain bool ro; metrics VM_metrics ref ro;
        guest_metrics VM_guest_metrics ref ro; last_booted_record string c; recommendations string rw;
        xenstore_data map rw; ha_always_run bool c; ha_restart_priority string c; is_a_snapshot bool ro;
        snapshot_of VM ref ro; snapshots VM refs ro; snapshot_time datetime ro; transportable_snapshot_id string ro;
        blobs map ro; tags strings rw; blocked_operations map rw; snapshot_info map ro; snapshot_metadata string ro;
        parent VM ref ro; children VM refs ro; bios_strings map ro; protection_policy VMPP ref c;
        is_snapshot_from_vmpp bool c; snapshot_schedule VMSS ref c; is_vmss_snapshot bool c;
        appliance VM_appliance ref c; start_delay int c; shutdown_delay int c; order int c; VGPUs VGPU refs ro;
        attached_PCIs PCI refs ro; suspend_SR SR ref rw; version int c; generation_id string c ="0:0";
        hardware_platform_version int rw; has_vendor_device bool c; requires_reboot bool ro; reference_label string c;
        domain_type domain_type c =unspecified; NVRAM map c; pending_guidances update_guidances set ro;
        pending_guidances_recommended update_guidances set ro; pending_guidances_full update_guidances set ro
    """,
    "VM_metrics": """
        uuid string ro; memory_actual int ro; VCPUs_number int ro; VCPUs_utilisation map ro; VCPUs_CPU map ro;
        VCPUs_params map ro; VCPUs_flags map ro; state strings ro; start_time datetime ro; install_time datetime ro;
        last_updated datetime ro; other_config map rw; hvm bool ro; nested_virt bool ro; nomigrate bool ro;
        current_domain_type domain_type ro =unspecified
    """,
    "VM_guest_metrics": """
        uuid string ro; os_version map ro; PV_drivers_version map ro; PV_drivers_up_to_date bool ro; memory map ro;
        disks map ro; networks map ro; other map ro; last_updated datetime ro; other_config map rw; live bool ro;
        can_use_hotplug_vbd tristate_type ro =unspecified; can_use_hotplug_vif tristate_type ro =unspecified;
        PV_drivers_detected bool ro
    """,
    "host_metrics": """
        uuid string ro; memory_total int ro; memory_free int ro; live bool ro; last_updated datetime ro;
        other_config map rw
    """,
    "SM": """
        uuid string ro; name_label string ro; name_description string ro; type string ro; vendor string ro;
        copyright string ro; version string ro; required_api_version string ro; configuration map ro;
        capabilities strings ro; features map ro; other_config map rw; driver_filename string ro;
        required_cluster_stack strings ro
    """,
    "SR": """
        uuid string ro; name_label string c; name_description string c; allowed_operations storage_operations set ro;
        current_operations map ro; VDIs VDI refs ro; PBDs PBD refs ro; virtual_allocation int ro;
        physical_utilisation int ro; physical_size int c; type string c; content_type string c; shared bool ro;
        other_config map rw; tags strings rw; sm_config map rw; blobs map ro; local_cache_enabled bool ro;
        introduced_by DR_task ref ro; clustered bool ro; is_tools_sr bool ro
    """,
    "VDI": """
        uuid string ro; name_label string c; name_description string c; allowed_operations vdi_operations set ro;
        current_operations map ro; SR SR ref c; VBDs VBD refs ro; crash_dumps crashdump refs ro; virtual_size int c;
        physical_utilisation int ro; type vdi_type c; sharable bool c; read_only bool c; other_config map rw;
        storage_lock bool ro; location string ro; managed bool ro; missing bool ro; parent VDI ref ro;
        xenstore_data map rw; sm_config map rw; is_a_snapshot bool ro; snapshot_of VDI ref ro; snapshots VDI refs ro;
        snapshot_time datetime ro; tags strings rw; allow_caching bool ro; on_boot on_boot ro =persist;
        metadata_of_pool pool ref ro; metadata_latest bool ro; is_tools_iso bool ro; cbt_enabled bool ro
    """,
    "VBD": """
        uuid string ro; allowed_operations vbd_operations set ro; current_operations map ro; VM VM ref c;
        VDI VDI ref c; device string c; userdevice string rw; bootable bool rw; mode vbd_mode c; type vbd_type rw;
        unpluggable bool rw =true; storage_lock bool ro; empty bool c; other_config map rw; currently_attached bool c;
        status_code int ro; status_detail string ro; runtime_properties map ro; qos_algorithm_type string rw;
        qos_algorithm_params map rw; qos_supported_algorithms strings ro; metrics VBD_metrics ref ro
    """,
    "VBD_metrics": """
        uuid string ro; io_read_kbs float ro; io_write_kbs float ro; last_updated datetime ro; other_config map rw
    """,
    "PBD": """
        uuid string ro; host host ref c; SR SR ref c; device_config map c; currently_attached bool ro;
        other_config map rw
    """,
    "message": """
        uuid string ro; name string ro; priority int ro; cls cls ro; obj_uuid string ro; timestamp datetime ro;
        body string ro
    """,
    "pool": """
        uuid string ro; name_label string rw; name_description string rw; master host ref ro; default_SR SR ref rw;
        suspend_image_SR SR ref rw; crash_dump_SR SR ref rw; other_config map rw; ha_enabled bool ro;
        ha_configuration map ro; ha_statefiles strings ro; ha_overcommitted bool ro; tags strings rw;
        redo_log_enabled bool ro; redo_log_vdi VDI ref ro; metadata_VDIs VDI refs ro; gui_config map rw;
        health_check_config map rw; restrictions map ro; wlb_enabled bool rw; wlb_url string ro; blobs map ro;
        current_operations map ro
    """,
    "host": """
        uuid string ro; name_label string rw; name_description string rw; memory_overhead int ro;
        allowed_operations host_allowed_operations set ro; current_operations map ro; API_version_major int ro =2;
        API_version_minor int ro =21; API_version_vendor string ro; API_version_vendor_implementation map ro;
        enabled bool ro =true; software_version map ro; other_config map rw; capabilities strings ro;
        cpu_configuration map ro; sched_policy string ro; supported_bootloaders strings ro; resident_VMs VM refs ro;
        logging map rw; PIFs PIF refs ro; PBDs PBD refs ro; suspend_image_sr SR ref rw; crash_dump_sr SR ref rw;
        local_cache_sr SR ref ro; metrics host_metrics ref ro; hostname string rw; address string rw; tags strings rw;
        license_params map ro; edition string ro; control_domain VM ref ro; chipset_info map ro; cpu_info map ro;
        blobs map ro
    """,
}

ENUMS = {
    "vm_power_state": "Halted Paused Running Suspended",
    "vbd_type": "Disk CD Floppy",
    "vbd_mode": "RW RO",
    "vdi_type": "user system ephemeral suspend crashdump ha_statefile metadata redo_log rrd pvs_cache cbt_metadata",
    "on_boot": "persist reset",
    "task_status_type": "pending success failure cancelling cancelled",
    "task_allowed_operations": "cancel destroy",
    "storage_operations": "scan destroy forget plug unplug update vdi_create vdi_introduce vdi_destroy vdi_resize vdi_clone"
    " vdi_snapshot vdi_revert vdi_mirror vdi_enable_cbt vdi_disable_cbt vdi_data_destroy vdi_list_changed_blocks"
    " vdi_set_on_boot pbd_create pbd_destroy",
    "vdi_operations": "clone copy resize resize_online snapshot mirror destroy forget update force_unlock generate_config"
    " enable_cbt disable_cbt data_destroy list_changed_blocks set_on_boot blocked revert_to revert_from",
    "vbd_operations": "attach eject insert plug unplug unplug_force pause unpause",
    "vm_operations": "snapshot clone copy checkpoint snapshot_with_quiesce provision start start_on pause unpause"
    " clean_shutdown hard_shutdown suspend resume resume_on revert reverting destroy export metadata_export",
    "host_allowed_operations": "provision evacuate vm_start vm_resume",
    "on_softreboot_behavior": "soft_reboot destroy restart preserve",
    "on_normal_exit": "destroy restart",
    "on_crash_behaviour": "destroy coredump_and_destroy restart coredump_and_restart preserve rename_restart",
    "domain_type": "unspecified hvm pv pv_in_pvh pvh",
    "tristate_type": "unspecified no yes",
    "cls": "VM Host SR Pool VMPP VMSS PVS_proxy VDI Certificate",
    "update_guidances": "reboot_host restart_toolstack restart_device_model restart_vm",
}
"""The first value is the default."""

DERIVED = {
    "VM": {"VBDs": ("VBD", "VM"), "snapshots": ("VM", "snapshot_of"), "children": ("VM", "parent")},
    "VDI": {"VBDs": ("VBD", "VDI"), "snapshots": ("VDI", "snapshot_of")},
    "SR": {"VDIs": ("VDI", "SR"), "PBDs": ("PBD", "SR")},
    "host": {"PBDs": ("PBD", "host"), "resident_VMs": ("VM", "resident_on")},
    "task": {"subtasks": ("task", "subtask_of")},
}
"""Fields that are not stored: whose other field points here (class and field of the pointing object)."""

TRANSIENT = {"session", "task"}
"""They end with the process."""

SETTERS = {
    "VM": "memory_static_max memory_dynamic_max memory_dynamic_min memory_static_min VCPUs_max"
    " VCPUs_at_startup HVM_boot_policy HVM_shadow_multiplier ha_always_run ha_restart_priority start_delay shutdown_delay"
    " order domain_type actions_after_crash NVRAM bios_strings",
    "VDI": "sharable read_only allow_caching",
    "VBD": "mode",
    "SR": "name_label name_description",
}
"""Fields that are not rw in the table and have a plain setter all the same."""

SM_SETTERS = {
    "VDI": "virtual_size physical_utilisation managed missing is_a_snapshot cbt_enabled snapshot_of snapshot_time"
    " metadata_of_pool",
    "SR": "virtual_allocation physical_size physical_utilisation",
}
"""Setters for the sessions of SM plug-ins alone."""
