//! Small tables that ops bring along: token ids, copies, which rows belong to which sequence and where its pages are.

use super::Cuda;
use super::driver::DevicePtr;
use super::launch::int;
use crate::error::Result;
use crate::ops::Span;

/// A batch's sequences on the device, all i32.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpanTable {
    /// `[n_spans, 4]`: first row, rows, past, index of its first page in `pages`.
    pub spans: DevicePtr,
    /// `[tokens]`: which span a row belongs to; −1 for none.
    pub row_span: DevicePtr,
    /// Page numbers of all spans.
    pub pages: DevicePtr,
}

impl Cuda {
    /// Calls `launch` with a table of ints on the device.
    pub(super) fn with_ints<R>(&self, words: Vec<i32>, launch: impl FnOnce(DevicePtr) -> Result<R>) -> Result<R> {
        self.queue.with_table(words, launch)
    }

    /// Calls `launch` with the spans of a batch of `tokens` rows. All layers of a pass have the same: they are copied once.
    pub(super) fn with_spans<R>(
        &self,
        op: &'static str,
        spans: &[Span<'_>],
        tokens: usize,
        launch: impl FnOnce(SpanTable) -> Result<R>,
    ) -> Result<R> {
        let fits = |what, n: usize| int(op, what, n).map(|_| n as i32);
        let mut words = Vec::new();
        let mut n_pages = 0;
        for span in spans {
            words.extend([span.first_row as i32, span.n_rows as i32, fits("past of a span", span.past)?, n_pages as i32]);
            n_pages += span.pages.len();
        }
        fits("tokens", tokens)?;
        fits("pages", n_pages)?;
        let mut row_span = vec![-1; tokens];
        for (i, span) in spans.iter().enumerate() {
            row_span[span.first_row..span.first_row + span.n_rows].fill(i as i32);
        }
        words.extend(row_span);
        for span in spans {
            words.extend(span.pages.iter().map(|&page| page as i32));
        }
        self.queue.with_table(words, |ptr| {
            let row_span = ptr.offset(spans.len() * 16);
            launch(SpanTable { spans: ptr, row_span, pages: row_span.offset(tokens * 4) })
        })
    }
}
