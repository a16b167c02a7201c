//! One process can be attached under one name only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::qemu::QemuOptions;
use crate::support::run::{Stage, finish, needs_two_cpus};

#[test]
fn a_process_that_is_attached_is_refused_under_another_name() {
    needs_two_cpus!("a_process_that_is_attached_is_refused_under_another_name");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let socket = stage.qemu.paths().shared.display().to_string();
    let holder =
        [&format!("process {} is attached as VM 100", stage.qemu.pid()), "qmpin detach 100"];
    for once in [false, true] {
        let attached = if once {
            stage.run(&["attach", "100", "--once"]).says(0, &[]);
            None
        } else {
            Some(stage.attach(&[]))
        };
        let pinned = stage.masks();
        for way in [
            &["attach", "other", "--qmp", &socket][..],
            &["attach", "other", "--qmp", &socket, "--once"],
        ] {
            stage.run(way).says(1, &holder);
            assert_eq!(stage.masks(), pinned);
        }
        match attached {
            Some(attached) => attached.end(),
            None => {
                stage.run(&["detach", "100"]).says(0, &[]);
            }
        }
        stage.assert_untouched(&before);
    }
}

#[test]
fn of_two_names_at_the_same_moment_one_is_refused() {
    needs_two_cpus!("of_two_names_at_the_same_moment_one_is_refused");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let socket = stage.qemu.paths().shared.display().to_string();
    for _ in 0..5 {
        let codes: Vec<Option<i32>> = std::thread::scope(|scope| {
            let attach = |name: &'static str| {
                let mut command = stage.command(&["attach", name, "--qmp", &socket, "--once"]);
                scope.spawn(move || finish(&mut command).code)
            };
            let both = [attach("one"), attach("two")];
            both.map(|command| command.join().unwrap()).into()
        });
        let done = codes.iter().filter(|code| **code == Some(0)).count();
        let refused = codes.iter().filter(|code| **code == Some(1)).count();
        assert_eq!((done, refused), (1, 1), "{codes:?}");
        stage.run(&["detach", "--all"]).says(0, &[]);
        stage.assert_untouched(&before);
    }
}
