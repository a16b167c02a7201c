//! How long the socket that Proxmox needs is held: from the greeting, with which QEMU turns to a client,
//! to the close, with which it turns to the next.

use qmpin::peer::Peer;
use qmpin::qmp::{CheckError, Limits, lease};

use crate::bare;
use crate::figures::{Samples, Table};
use crate::vm::Vm;

const ROUNDS: usize = 200;

pub(crate) fn measure(table: &mut Table) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for vcpus in [4, 16, 64] {
        let vm = Vm::with_vcpus(vcpus);
        let (socket, limits) = (vm.socket(), Limits::default());
        let accept = |_: &Peer| Ok::<(), CheckError>(());
        let (mut ours, mut bare) = (Samples::default(), Samples::default());
        for _ in 0..ROUNDS {
            ours.add(runtime.block_on(lease(&socket, accept, &limits)).unwrap().held);
            bare.add(bare::visit(&socket).unwrap().held);
        }
        let what = format!("a lease holds the socket, {vcpus} vCPUs; the bare minimum");
        table.at_most(&what, &ours, &bare, "<= 1.2 x");
    }
}
