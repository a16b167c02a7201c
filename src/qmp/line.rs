//! Lines out of a byte stream, with a bound on what is buffered.

use std::io;
use std::ops::Range;

use tokio::io::{AsyncRead, AsyncReadExt};

/// The buffer at the start: the replies of a VM with some hundred vCPUs fit, so one read does.
const BUFFER_BYTES: usize = 32 << 10;

/// Why there is no next line.
#[derive(Debug)]
pub(super) enum LineError {
    /// The peer closed; that many bytes of an unfinished line had come.
    Closed { partial_bytes: usize },
    /// The line is longer than the limit.
    TooLong,
    /// Reading failed.
    Io(io::Error),
}

/// Cuts a byte stream into lines. Never holds more than one longest line and its newline.
#[derive(Debug)]
pub(super) struct LineReader {
    buffer: Vec<u8>,
    /// Where the unread part begins.
    start: usize,
    /// Up to where there is no newline.
    scanned: usize,
    line_bytes_max: usize,
}

impl LineReader {
    pub(super) fn new(line_bytes_max: usize) -> LineReader {
        LineReader { buffer: Vec::new(), start: 0, scanned: 0, line_bytes_max }
    }

    /// The next line's place in [`bytes`](LineReader::bytes), without its newline. The place is
    /// good until the next call.
    ///
    /// Cancel safe: what was read stays in the buffer (`read_buf` appends only what it returns).
    pub(super) async fn next_line<R: AsyncRead + Unpin>(
        &mut self,
        source: &mut R,
    ) -> Result<Range<usize>, LineError> {
        loop {
            let unscanned = &self.buffer[self.scanned..];
            if let Some(offset) = unscanned.iter().position(|&byte| byte == b'\n') {
                let line = self.start..self.scanned + offset;
                self.start = line.end + 1;
                self.scanned = self.start;
                return if line.len() > self.line_bytes_max {
                    Err(LineError::TooLong)
                } else {
                    Ok(line)
                };
            }
            self.scanned = self.buffer.len();
            let partial_bytes = self.buffer.len() - self.start;
            if partial_bytes > self.line_bytes_max {
                return Err(LineError::TooLong);
            }
            self.make_room();
            // `read_buf` fills the spare capacity and does not grow the buffer beyond it.
            match source.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(LineError::Closed { partial_bytes }),
                Ok(_) => {}
                Err(error) => return Err(LineError::Io(error)),
            }
        }
    }

    /// The bytes that the places of [`next_line`](LineReader::next_line) refer to.
    pub(super) fn bytes(&self, line: Range<usize>) -> &[u8] {
        self.buffer.get(line).unwrap_or_default()
    }

    /// Moves the unread part to the front and leaves room behind it, within the limit.
    fn make_room(&mut self) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        if self.buffer.is_empty() && self.buffer.capacity() > 2 * BUFFER_BYTES {
            self.buffer = Vec::new(); // a long reply is rare; do not keep its memory
        }
        if self.buffer.len() == self.buffer.capacity() {
            let wanted = (self.buffer.capacity() * 2).max(BUFFER_BYTES);
            let bounded = wanted.min(self.line_bytes_max + 1).max(self.buffer.len() + 1);
            self.buffer.reserve_exact(bounded - self.buffer.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_all(mut bytes: &[u8], max: usize) -> (Vec<Vec<u8>>, LineError, usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut reader = LineReader::new(max);
            let mut lines = Vec::new();
            loop {
                match reader.next_line(&mut bytes).await {
                    Ok(line) => lines.push(reader.bytes(line).to_vec()),
                    Err(error) => return (lines, error, reader.buffer.capacity()),
                }
            }
        })
    }

    #[test]
    fn an_endless_line_is_refused_within_the_limit() {
        let (lines, error, capacity) = read_all(&vec![b'x'; 10 << 20], 1 << 20);
        assert!(lines.is_empty());
        assert!(matches!(error, LineError::TooLong), "{error:?}");
        assert!(capacity <= (1 << 20) + 16, "{capacity}");
    }

    #[test]
    fn a_line_of_just_the_limit_is_taken() {
        let (lines, error, _) = read_all(b"12345678\n123456789\n", 8);
        assert_eq!(lines, [b"12345678"]);
        assert!(matches!(error, LineError::TooLong), "{error:?}");
    }

    proptest! {
        #[test]
        fn lines_are_those_of_split(bytes in prop::collection::vec(
            prop_oneof![3 => Just(b'x'), 1 => Just(b'\n'), 1 => any::<u8>()], 0..600)) {
            let (lines, error, _) = read_all(&bytes, 8192);
            let mut split: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
            let rest = split.pop().unwrap_or_default();
            prop_assert_eq!(lines, split);
            let right =
                matches!(error, LineError::Closed { partial_bytes } if partial_bytes == rest.len());
            prop_assert!(right, "{:?}", error);
        }
    }
}
