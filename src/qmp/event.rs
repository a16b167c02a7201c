//! Events: hints that something changed. They are read leniently, kept in a short queue, and floods
//! are put together.

use std::collections::VecDeque;

use qapi::qmp;
use serde::Deserialize;
use serde_json::Value;

use super::Tolerated;
use super::error::excerpt;

/// The most events kept while they are not read.
const QUEUE_EVENTS_MAX: usize = 64;

/// The longest event line whose data is kept, in bytes. The longest that QEMU sends on its own,
/// about a block job, has some hundred.
const EVENT_BYTES_MAX: usize = 4096;

/// The longest event name, in bytes; QEMU's longest has 34.
const NAME_BYTES_MAX: usize = 64;

/// The events of QEMU 7.2 to 11.1 (`query-qmp-schema`), sorted. Others are handed on all the same,
/// and counted.
#[rustfmt::skip]
pub const EVENTS_KNOWN: &[&str] = &[
    "ACPI_DEVICE_OST", "BALLOON_CHANGE", "BLOCK_EXPORT_DELETED", "BLOCK_IMAGE_CORRUPTED",
    "BLOCK_IO_ERROR", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR",
    "BLOCK_JOB_PENDING", "BLOCK_JOB_READY", "BLOCK_WRITE_THRESHOLD", "COLO_EXIT",
    "CPU_POLARIZATION_CHANGE", "DEVICE_DELETED", "DEVICE_TRAY_MOVED",
    "DEVICE_UNPLUG_GUEST_ERROR", "DUMP_COMPLETED", "FAILOVER_NEGOTIATED", "GUEST_CRASHLOADED",
    "GUEST_PANICKED", "GUEST_PVSHUTDOWN", "HV_BALLOON_STATUS_REPORT", "JOB_STATUS_CHANGE",
    "MEMORY_DEVICE_SIZE_CHANGE", "MEMORY_FAILURE", "MEM_UNPLUG_ERROR", "MIGRATION",
    "MIGRATION_PASS", "NETDEV_STREAM_CONNECTED", "NETDEV_STREAM_DISCONNECTED",
    "NETDEV_VHOST_USER_CONNECTED", "NETDEV_VHOST_USER_DISCONNECTED", "NIC_RX_FILTER_CHANGED",
    "POWERDOWN", "PR_MANAGER_STATUS_CHANGED", "QUORUM_FAILURE", "QUORUM_REPORT_BAD",
    "RDMA_GID_STATUS_CHANGED", "RESET", "RESUME", "RTC_CHANGE", "SCLP_CPI_INFO_AVAILABLE",
    "SHUTDOWN", "SPICE_CONNECTED", "SPICE_DISCONNECTED", "SPICE_INITIALIZED",
    "SPICE_MIGRATE_COMPLETED", "STOP", "SUSPEND", "SUSPEND_DISK", "UNPLUG_PRIMARY",
    "VFIO_MIGRATION", "VFU_CLIENT_HANGUP", "VNC_CONNECTED", "VNC_DISCONNECTED",
    "VNC_INITIALIZED", "VSERPORT_CHANGE", "WAKEUP", "WATCHDOG",
];

/// An event of QEMU's.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, such as `RESET`; printable.
    pub name: String,
    /// Its data, or null: without data, or with more than we keep.
    pub data: Value,
    /// When it was sent, in µs since 1970 by the host's clock, where QEMU knew.
    pub timestamp_us: Option<u64>,
}

/// Reads an event's line and counts what is odd about it. `None` where it has no name.
pub(super) fn read_event(line: &[u8], tolerated: &mut Tolerated) -> Option<QmpEvent> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Full {
        event: String,
        data: Value,
        timestamp: Value,
    }
    #[derive(Deserialize)]
    struct NameOnly {
        event: String,
    }
    let short = line.len() <= EVENT_BYTES_MAX;
    let full = short.then(|| serde_json::from_slice::<Full>(line).ok()).flatten();
    let full = if let Some(full) = full {
        full
    } else {
        let NameOnly { event } = serde_json::from_slice(line).ok()?;
        tolerated.stripped_events += 1;
        Full { event, ..Full::default() }
    };
    let timestamp_us = timestamp_us(&full.timestamp);
    if timestamp_us.is_none() {
        tolerated.bad_timestamps += 1;
    }
    let mut name = full.event;
    if name.len() > NAME_BYTES_MAX || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        name = excerpt(name.as_bytes().get(..NAME_BYTES_MAX).unwrap_or(name.as_bytes()));
    }
    if EVENTS_KNOWN.binary_search(&name.as_str()).is_err() {
        tolerated.unknown_events += 1;
    } else if !is_as_in_schema(&name, &full.data) {
        tolerated.odd_events += 1;
    }
    Some(QmpEvent { name, data: full.data, timestamp_us })
}

fn timestamp_us(timestamp: &Value) -> Option<u64> {
    let seconds = timestamp.get("seconds")?.as_u64()?;
    let microseconds = timestamp.get("microseconds")?.as_u64()?;
    seconds.checked_mul(1_000_000)?.checked_add(microseconds)
}

/// Whether the data is as the schema of the `qapi` crate has it. Only for the count: an event with
/// an enum value of the future is as good a hint as any.
fn is_as_in_schema(name: &str, data: &Value) -> bool {
    match name {
        "ACPI_DEVICE_OST" => qmp::ACPI_DEVICE_OST::deserialize(data).is_ok(),
        "DEVICE_DELETED" => qmp::DEVICE_DELETED::deserialize(data).is_ok(),
        "GUEST_PANICKED" => qmp::GUEST_PANICKED::deserialize(data).is_ok(),
        "MIGRATION" => qmp::MIGRATION::deserialize(data).is_ok(),
        "RESET" => qmp::RESET::deserialize(data).is_ok(),
        "SHUTDOWN" => qmp::SHUTDOWN::deserialize(data).is_ok(),
        _ => true,
    }
}

/// Events that were not read yet. A hint that waits already is not kept twice.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    events: VecDeque<QmpEvent>,
}

impl EventQueue {
    pub(super) fn push(&mut self, event: QmpEvent, tolerated: &mut Tolerated) {
        let same =
            |waiting: &&mut QmpEvent| waiting.name == event.name && waiting.data == event.data;
        if let Some(waiting) = self.events.iter_mut().find(same) {
            waiting.timestamp_us = event.timestamp_us;
            tolerated.coalesced_events += 1;
            return;
        }
        if self.events.len() == QUEUE_EVENTS_MAX {
            // The newest say how things are; that there was something is said by any of them.
            self.events.pop_front();
            tolerated.dropped_events += 1;
        }
        self.events.push_back(event);
    }

    pub(super) fn pop(&mut self) -> Option<QmpEvent> {
        self.events.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> (Option<QmpEvent>, Tolerated) {
        let mut tolerated = Tolerated::default();
        (read_event(line.as_bytes(), &mut tolerated), tolerated)
    }

    #[test]
    fn known_events_are_sorted_for_the_search() {
        assert!(EVENTS_KNOWN.is_sorted());
    }

    #[test]
    fn a_timestamp_of_minus_one_is_no_timestamp() {
        let line = r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}"#;
        let (event, tolerated) = read(line);
        let event = event.unwrap();
        assert_eq!(
            (event.name.as_str(), event.data, event.timestamp_us),
            ("STOP", Value::Null, None)
        );
        assert_eq!(tolerated, Tolerated { bad_timestamps: 1, ..Tolerated::default() });
    }

    #[test]
    fn a_reset_for_a_reason_of_the_future_is_handed_on_and_counted() {
        let (event, tolerated) = read(
            r#"{"timestamp": {"seconds": 1, "microseconds": 5}, "event": "RESET",
                "data": {"guest": true, "reason": "cosmic-ray"}}"#,
        );
        assert_eq!(event.unwrap().timestamp_us, Some(1_000_005));
        assert_eq!(tolerated, Tolerated { odd_events: 1, ..Tolerated::default() });
    }

    #[test]
    fn a_deep_or_long_event_keeps_only_its_name() {
        let deep =
            format!(r#"{{"event": "RESET", "data": {}{}}}"#, "[".repeat(999), "]".repeat(999));
        let long = format!(r#"{{"event": "RESET", "data": "{}"}}"#, "x".repeat(EVENT_BYTES_MAX));
        for line in [deep, long] {
            let (event, tolerated) = read(&line);
            let event = event.unwrap();
            assert_eq!((event.name.as_str(), event.data), ("RESET", Value::Null));
            assert_eq!(tolerated.stripped_events, 1);
        }
    }

    #[test]
    fn a_name_cannot_drive_a_terminal() {
        let (event, tolerated) = read("{\"event\": \"\\u001b[2J\"}");
        assert_eq!(event.unwrap().name, "\\u{1b}[2J");
        assert_eq!(tolerated.unknown_events, 1);
        assert!(read(r#"{"event": 7}"#).0.is_none());
    }

    #[test]
    fn a_flood_is_put_together_and_the_queue_is_bounded() {
        let (mut queue, mut tolerated) = (EventQueue::default(), Tolerated::default());
        for number in 0..1000_u64 {
            let event =
                QmpEvent { name: "RESET".into(), data: Value::Null, timestamp_us: Some(number) };
            queue.push(event.clone(), &mut tolerated);
            queue.push(QmpEvent { data: number.into(), ..event }, &mut tolerated);
        }
        let kept: Vec<QmpEvent> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(kept.len(), QUEUE_EVENTS_MAX);
        assert_eq!(kept.last().unwrap().data, Value::from(999));
        assert_eq!(tolerated.coalesced_events + tolerated.dropped_events, 2000 - 64);
    }
}
