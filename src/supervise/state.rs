//! What to do next: events become values, and one plain function turns them into effects. No tokio,
//! no clock, no I/O.
//!
//! ```text
//!            a hint                      pass: all known            nothing
//!   Watching ────────▶ PassSoon ─▶ Pass ─────────────────▶ Watching
//!      ▲                             │ a thread QMP must name
//!      │                             ▼
//!      └───── Pass ◀──── Roles ◀── AskSoon ─▶ Ask
//!
//!   anywhere: QEMU has ended, or we are asked to stop ─▶ Finish
//! ```
//!
//! Hints are coalesced: any number of them before a pass is one pass. Asking goes on in the
//! background, since Proxmox may hold the socket for long; passes go on meanwhile.

use crate::attachment::reports::Noticed;

/// Something that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// Something may have changed: a thread was created, another VM came or went, or the guest was reset, stopped or
    /// resumed, so that threads stay and their masks should.
    Changed,
    /// A device came or went: it may be a vCPU.
    DeviceChanged,
    /// The slow timer.
    Ticked,
    /// The delay of a pass is over.
    PassDue,
    /// The delay of a question is over.
    AskDue,
    /// A pass is done.
    Passed(Noticed),
    /// QEMU has answered, and it made sense.
    Answered,
    /// QEMU has not answered, or it made no sense.
    NotAnswered,
    /// A live channel, which gives events, is to be had.
    ChannelLive,
    /// It is gone: there are leases only.
    ChannelLost,
    /// The QEMU process has ended.
    QemuEnded,
    /// We are asked to stop.
    Stop,
}

/// Something to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    /// A pass after a short delay, in which further hints join.
    PassSoon,
    /// A pass now: scan, plan if need be, compare, correct.
    Pass,
    /// Ask after a delay that keeps questions rare.
    AskSoon,
    /// Ask QEMU now who is who.
    Ask,
    /// Try for a live channel.
    Upgrade,
    /// Restore everything and end.
    Finish(Ending),
}

/// Why it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// QEMU has ended.
    QemuEnded,
    /// We were asked to.
    Asked,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Asking {
    #[default]
    Idle,
    /// A delay is running.
    Soon,
    /// QEMU has been asked; `again`: something has changed since.
    Asked { again: bool },
}

/// What is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct State {
    pass_soon: bool,
    asking: Asking,
    /// Why it ends, once it does.
    pub(crate) ending: Option<Ending>,
}

impl State {
    /// Takes one event.
    pub(crate) fn handle(&mut self, event: Event) -> Vec<Effect> {
        if self.ending.is_some() {
            return Vec::new();
        }
        match event {
            Event::QemuEnded => self.finish(Ending::QemuEnded),
            Event::Stop => self.finish(Ending::Asked),
            // The slow timer causes a pass at once: nothing will join it.
            Event::Ticked => vec![Effect::Pass],
            Event::DeviceChanged => [self.pass_soon(), self.ask_soon()].concat(),
            Event::Changed => self.pass_soon(),
            Event::PassDue => {
                self.pass_soon = false;
                vec![Effect::Pass]
            }
            Event::Passed(found) if found.unnamed || found.named_gone => self.ask_soon(),
            Event::AskDue if self.asking == Asking::Soon => {
                self.asking = Asking::Asked { again: false };
                vec![Effect::Ask]
            }
            Event::Passed(_) | Event::AskDue => Vec::new(),
            Event::Answered | Event::NotAnswered => {
                let again = self.asking == Asking::Asked { again: true };
                self.asking = Asking::Idle;
                let mut effects = Vec::new();
                if event == Event::Answered {
                    effects.push(Effect::Pass);
                }
                if again || event == Event::NotAnswered {
                    effects.extend(self.ask_soon());
                }
                effects
            }
            // Events were lost in between, so a pass follows; a lost channel is tried for again.
            Event::ChannelLive => self.ask_soon(),
            Event::ChannelLost => [self.pass_soon(), vec![Effect::Upgrade]].concat(),
        }
    }

    fn finish(&mut self, ending: Ending) -> Vec<Effect> {
        self.ending = Some(ending);
        vec![Effect::Finish(ending)]
    }

    fn pass_soon(&mut self) -> Vec<Effect> {
        if std::mem::replace(&mut self.pass_soon, true) {
            Vec::new()
        } else {
            vec![Effect::PassSoon]
        }
    }

    fn ask_soon(&mut self) -> Vec<Effect> {
        match &mut self.asking {
            Asking::Idle => {
                self.asking = Asking::Soon;
                vec![Effect::AskSoon]
            }
            Asking::Soon => Vec::new(),
            Asking::Asked { again } => {
                *again = true;
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::reports::Noticed;

    #[test]
    fn a_flood_of_hints_is_one_look() {
        let mut state = State::default();
        assert_eq!(state.handle(Event::Changed), [Effect::PassSoon]);
        for _ in 0..3 {
            assert_eq!(state.handle(Event::Changed), []);
        }
        assert_eq!(state.handle(Event::PassDue), [Effect::Pass]);
        assert_eq!(state.handle(Event::Changed), [Effect::PassSoon]);
    }

    #[test]
    fn an_unnamed_thread_leads_to_one_question_and_a_look_at_the_answer() {
        let mut state = State::default();
        let unnamed = Event::Passed(Noticed { unnamed: true, ..Noticed::default() });
        assert_eq!(state.handle(unnamed), [Effect::AskSoon]);
        assert_eq!(state.handle(unnamed), []);
        assert_eq!(state.handle(Event::AskDue), [Effect::Ask]);
        assert_eq!(state.handle(Event::Answered), [Effect::Pass]);
        assert_eq!(state.handle(Event::Passed(Noticed::default())), []);
    }

    #[test]
    fn what_changes_while_qemu_is_asked_is_asked_again() {
        let mut state = State::default();
        let unnamed = Event::Passed(Noticed { unnamed: true, ..Noticed::default() });
        state.handle(unnamed);
        state.handle(Event::AskDue);
        assert_eq!(state.handle(unnamed), []);
        assert_eq!(state.handle(Event::Answered), [Effect::Pass, Effect::AskSoon]);
    }

    #[test]
    fn a_question_without_an_answer_is_put_again() {
        let mut state = State::default();
        state.handle(Event::DeviceChanged);
        state.handle(Event::AskDue);
        assert_eq!(state.handle(Event::NotAnswered), [Effect::AskSoon]);
    }

    #[test]
    fn the_end_comes_once_and_nothing_after_it() {
        let mut state = State::default();
        assert_eq!(state.handle(Event::QemuEnded), [Effect::Finish(Ending::QemuEnded)]);
        assert_eq!(state.handle(Event::Stop), []);
        assert_eq!(state.handle(Event::Changed), []);
    }
}
