use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::*;

struct World(tempfile::TempDir);

impl World {
    fn new() -> World {
        let world = World(tempfile::tempdir().expect("a folder"));
        fs::create_dir(world.path("state")).expect("made");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn folder(&self) -> io::Result<Folder> {
        Folder::open(&self.path("state"), FolderLink::Refuse)
    }

    /// What each way to use the file `f` says.
    fn all_ways(&self) -> Vec<Result<(), String>> {
        let folder = self.folder().expect("a folder");
        let name = OsStr::new("f");
        let say = |result: io::Result<()>| result.map_err(|error| error.to_string());
        vec![
            say(folder.read(name, 100).map(|_| ())),
            say(folder.append(name).map(|_| ())),
            say(folder.open_or_create(name).map(|_| ())),
            say(folder.create_new(name, 0o600).map(|_| ())),
            say(folder.replace(name, b"new")),
        ]
    }
}

fn is_distrust(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Distrust>())
}

fn may_chown(test: &str, path: &Path) -> bool {
    let may = chown(path, Some(65534), None).is_ok();
    if !may {
        // Past the capture of the test harness and off its line of dots, to be counted.
        let text = format!("\nskipped: {test}: not root, so no file can be another user's\n");
        let _ = io::stderr().write_all(text.as_bytes());
    }
    may
}

#[test]
fn only_regular_files_are_opened_and_nothing_blocks() {
    let (world, started) = (World::new(), Instant::now());
    let target = world.path("target");
    fs::write(&target, "theirs").expect("written");
    let file = world.path("state/f");
    let make: [(&str, &dyn Fn()); 5] = [
        ("a symbolic link", &|| symlink(&target, &file).expect("a link")),
        ("a symbolic link", &|| symlink(world.path("nowhere"), &file).expect("a link")),
        ("a directory", &|| fs::create_dir(&file).expect("a folder")),
        ("a socket", &|| drop(UnixListener::bind(&file).expect("a socket"))),
        ("a FIFO", &|| {
            rustix::fs::mkfifoat(CWD, &file, Mode::from_raw_mode(0o600)).expect("a FIFO");
        }),
    ];
    for (what, make) in make {
        make();
        for said in world.all_ways() {
            let said = said.expect_err(what);
            assert_eq!(said, format!("it is {what}, not a regular file"));
        }
        if fs::remove_file(&file).is_err() {
            fs::remove_dir(&file).expect("removed");
        }
    }
    assert_eq!(fs::read_to_string(&target).expect("there"), "theirs");
    assert!(!world.path("nowhere").exists());
    assert!(started.elapsed() < Duration::from_secs(5));
    // A device is known by its kind, before it is opened.
    let (dev, null) = folder_of(Path::new("/dev/null"), FolderLink::Follow).expect("/dev");
    let error = dev.read(null, 1).expect_err("a device");
    assert!(error.to_string().contains("a device") && is_distrust(&error), "{error}");
}

#[test]
fn files_and_folders_that_others_can_change_are_refused() {
    let world = World::new();
    let (file, dir) = (world.path("state/f"), world.path("state"));
    let read = || read_state(&file, 100).map_err(|error| error.to_string());
    fs::write(&file, "text").expect("written");
    assert_eq!(read(), Ok("text".to_owned()));
    for (path, mode, back) in [(&file, 0o664, 0o644), (&file, 0o646, 0o644), (&dir, 0o1777, 0o755)]
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        let said = read().expect_err("writable");
        assert!(
            said.contains(&format!("mode {mode:04o}")) && said.contains("chmod go-w"),
            "{said}"
        );
        fs::set_permissions(path, fs::Permissions::from_mode(back)).expect("chmod");
    }
    let test = "files_and_folders_that_others_can_change_are_refused";
    for path in [&file, &dir] {
        if !may_chown(test, path) {
            return;
        }
        let said = read().expect_err("another user's");
        assert!(said.contains("belongs to user 65534"), "{said}");
        chown(path, Some(0), None).expect("chown");
    }
    assert_eq!(read(), Ok("text".to_owned()));
}

#[test]
fn a_folder_behind_a_link_is_refused_for_state_and_followed_for_configuration() {
    let world = World::new();
    fs::write(world.path("state/f"), "text").expect("written");
    symlink(world.path("state"), world.path("link")).expect("a link");
    let path = world.path("link/f");
    let said = read_state(&path, 100).expect_err("a link").to_string();
    assert!(said.contains("link: it is a symbolic link, not a directory"), "{said}");
    assert_eq!(read_config(&path, 100).expect("followed"), "text");
    assert!(create_folder(&world.path("link")).is_err());
    let said = read_state(&world.path("state/f/x"), 100).expect_err("a file").to_string();
    assert!(said.contains("it is a regular file, not a directory"), "{said}");
}

#[test]
fn a_replaced_file_is_whole_and_leaves_nothing_beside_it() {
    let world = World::new();
    let folder = create_folder(&world.path("state/deep/er")).expect("made");
    let name = OsStr::new("f");
    fs::write(world.path("state/deep/er/f.new"), "half").expect("left by a killed process");
    for text in ["first", "second"] {
        folder.replace(name, text.as_bytes()).expect("replaced");
        assert_eq!(folder.read(name, 100).expect("read"), text);
    }
    assert_eq!(folder.names().expect("listed"), ["f"]);
    assert!(folder.read(name, 5).is_err_and(|error| error.to_string().contains("larger")));
    assert!(folder.remove(name).expect("removed"));
    assert!(!folder.remove(name).expect("gone already"));
    assert!(folder.read(name, 100).is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
}

#[test]
fn a_link_in_the_place_of_the_new_file_is_not_followed() {
    let world = World::new();
    fs::write(world.path("target"), "theirs").expect("written");
    symlink(world.path("target"), world.path("state/f.new")).expect("a link");
    let folder = world.folder().expect("a folder");
    let error = folder.replace(OsStr::new("f"), b"ours").expect_err("a link");
    assert!(is_distrust(&error), "{error}");
    assert_eq!(fs::read_to_string(world.path("target")).expect("there"), "theirs");
}
