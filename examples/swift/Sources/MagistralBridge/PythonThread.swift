import Foundation

/// The one thread that runs Python: it initializes the interpreter and keeps the GIL to the end.
///
/// A dispatch queue changes its threads, but Python's state belongs to the thread that initialized it.
final class PythonThread: SerialExecutor, @unchecked Sendable {
    static let shared = PythonThread()

    private let condition = NSCondition()
    private var jobs: [UnownedJob] = []

    private init() {
        let thread = Thread { self.run() }
        thread.name = "Python"
        thread.stackSize = 16 << 20  // Python's own threads have as much on macOS
        thread.start()
    }

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        condition.lock()
        jobs.append(job)
        condition.signal()
        condition.unlock()
    }

    func asUnownedSerialExecutor() -> UnownedSerialExecutor {
        UnownedSerialExecutor(ordinary: self)
    }

    private func run() {
        while true {
            condition.lock()
            while jobs.isEmpty { condition.wait() }
            let job = jobs.removeFirst()
            condition.unlock()
            job.runSynchronously(on: asUnownedSerialExecutor())
        }
    }
}
