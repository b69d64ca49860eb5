//! Spans and events for the crate `tracing`, with the feature of that name. Without it the macros expand to nothing.
//!
//! | what | level | fields |
//! | --- | --- | --- |
//! | span `fault` | TRACE | `address`, `kind`, `thread`, and `process` where it is known: of a virtual machine its monitor |
//! | span `load` | TRACE | `offset`, `len`: a read of the source |
//! | event `filled` | TRACE | `address`, `len` |
//! | event `put off` | DEBUG | `work`, `delay` |
//! | event `change` | DEBUG | `change`: a fork, a removal, a move, an unmapping |
//! | event `problem` | WARN | `problem` |

/// Enters a span until the end of the block.
macro_rules! span {
    ($name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        // Where no subscriber could want it, not even a disabled span is made.
        #[cfg(feature = "tracing")]
        let _span = (tracing::level_filters::LevelFilter::current() == tracing::level_filters::LevelFilter::TRACE)
            .then(|| tracing::trace_span!(target: "userfaultfd::pager", $name $(, $field = $value)*).entered());
    };
}

/// Emits an event, at a level.
macro_rules! event {
    ($level:ident, $name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        #[cfg(feature = "tracing")]
        tracing::event!(target: "userfaultfd::pager", tracing::Level::$level, $($field = $value,)* $name);
    };
}

pub(crate) use {event, span};

#[cfg(all(test, feature = "tracing"))]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    use crate::LazyMemory;
    use crate::pager::{FaultAround, PageData, RetryPolicy};

    /// A subscriber that records spans and events.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<String>>>);

    struct Line(String);

    impl Visit for Line {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0 += &format!(" {field}={value:?}");
        }
    }

    impl Log {
        fn add(&self, metadata: &Metadata<'_>, record: impl FnOnce(&mut Line)) {
            let mut line = Line(format!("{} {}", metadata.level(), metadata.name()));
            record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }
    }

    impl Subscriber for Log {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == "userfaultfd::pager"
        }
        fn new_span(&self, span: &Attributes<'_>) -> Id {
            self.add(span.metadata(), |line| span.record(line));
            Id::from_u64(1)
        }
        fn record(&self, _span: &Id, _values: &Record<'_>) {}
        fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
        fn event(&self, event: &Event<'_>) {
            self.add(event.metadata(), |line| event.record(line));
        }
        fn enter(&self, _span: &Id) {}
        fn exit(&self, _span: &Id) {}
    }

    #[test]
    fn faults_loads_and_problems_are_traced() {
        crate::support::require!();
        let log = Log::default();
        tracing::subscriber::set_global_default(log.clone()).expect("the only test that sets one");
        let page = crate::page_size();
        let source = |_: u64, page: &mut [u8]| {
            page.fill(1);
            Ok(PageData::Data)
        };
        let memory = LazyMemory::builder(source).len(4 * page).fault_around(FaultAround::Page);
        let memory = memory.retry(RetryPolicy { attempts: 1, ..RetryPolicy::default() }).build().unwrap();
        assert_eq!(memory[2 * page], 1);
        let start = memory.as_ptr().addr() + 2 * page;
        drop(memory);
        let log = log.0.lock().unwrap();
        let has = |part: &str| log.iter().any(|line| line.contains(part));
        assert!(has(&format!("TRACE fault address={start:?} kind=Missing")), "{log:#?}");
        assert!(has(&format!("TRACE load offset={} len={page}", 2 * page)), "{log:#?}");
        assert!(has(&format!("address={start:?} len={page}")), "{log:#?}");
    }
}
